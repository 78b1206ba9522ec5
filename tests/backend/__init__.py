"""The backend "bls" of torch.distributed.

By default its core is tested; the rest (torch.compile, spawn, restarts) by `bash ci/test -m slow tests/backend`, and
torch's own test-suite and TorchRec by `bash ci/torch-suites`, which installs what they need.
"""
