"""The backend of CPU tensors: int8 products through oneDNN, masks by sorting networks."""
