"""The backend of CPU tensors: int8 GEMMs through oneDNN, masks by sorting networks."""
