"""`python -m bench gpu`: tables and messages in GPU memory. See bench.gpu.command.

command     the command: parts one after the other, each in processes of its own; report: the tables, out of the JSON
lookup      pooled lookups (in a rank: lookup_rank), next to torch's and FBGEMM's
exchange    ranks on one GPU (in the ranks: exchange_rank), next to gloo, MPI and NCCL; mps: NVIDIA's server for such
dlrm        the whole model, as `python -m dlrm --device cuda` has it (in the ranks: dlrm_rank)
tune        by itself, `python -m bench.gpu.tune`: other ways to compile and cut the kernels
effort      what is measured, and for how long; teams: the ranks
device      in a rank: the GPU, its clock, what a copy reaches
"""
