"""Who talks to whom: ranks and groups, ZeRO, gradient synchronisation, and life without CUDA."""
