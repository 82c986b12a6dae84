"""Who talks to whom: ranks and groups, ZeRO, gradient synchronisation, and what the engines need on a machine without CUDA."""
