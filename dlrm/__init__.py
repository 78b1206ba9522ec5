"""DLRM inference over bounded-lag exchanges: `python -m dlrm --help`.

A batch walks through the rooms like this: `data` yields a Batch -> `engine` begins an iteration -> `routes` looks
the rank's own tables up and posts the pooled vectors -> `dense` runs the bottom MLP meanwhile, then, once every
rank's vectors are here, the interaction and the top MLP -> predictions leave in order. `worker` is what one rank
does from start to end, `launch` starts the ranks.
"""
