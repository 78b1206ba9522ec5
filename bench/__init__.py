"""Measurements: `python -m bench --help`. Stands on top of blsrdma; nothing there knows it.

cases       what is measured: ranks, message sizes, lag, and the deterministic table of sizes that every system gets
values      messages whose bytes say who sent them, to whom and when
systems/    one file for each library that exchanges: ours, torch (gloo, nccl), mpi (MPICH, Open MPI)
rank        what runs in every rank: takes commands from the controller, sleeps between them
team        the controller's side: starts the ranks of one library, sends commands, collects replies
launchers   how each library's ranks are started, with which interpreter and settings
harness     the order of measurements: interleaved repetitions, correctness before time
simulate    what the max-plus model says of many lags and up to thousands of ranks
advise      which lag a user's job should take, by the model, from its timings, which `timings` reads
summary     from raw samples to medians, spreads and ratios
results     what a run leaves, as JSON; report: its tables; plot: its picture; publish: where tables go
environment the machine, versions and load that numbers belong to
limits/     what the machine could do at best; stress (stress_rank in the ranks): random and verified; scale: many ranks
delays      every system while ranks are delayed, next to the model: delay_report its tables, delay_plot its picture
gpu/        tables and messages in GPU memory
inference   a whole DLRM over ranks (inference_rank in the ranks), next to plain_dlrm, as anybody would write it;
            quiet: latencies while one rank has no arrivals
"""
