from __future__ import annotations

import pytest

from dlrm import flags
from dlrm.errors import OptionError
from dlrm.options import parse


def test_defaults_are_a_quick_run_of_the_sample() -> None:
    options = parse([])
    assert options.data_generation == "sample"
    assert options.arch_mlp_bot == (13, 512, 256, 64, 16)
    shape = options.shape((10,) * 26)
    assert shape.top == (16 + 27 * 26 // 2, 512, 256, 1)
    assert options.digest is False
    assert parse(["--verify"]).digest is True


def test_the_reference_command_line() -> None:
    options = parse(
        "--arch-sparse-feature-size=8 --arch-embedding-size=10-20-30 --arch-mlp-bot=4-8 --arch-mlp-top=16-1 "
        "--arch-interaction-op=cat --mini-batch-size=32 --num-batches=5 --num-indices-per-lookup=3 "
        "--num-indices-per-lookup-fixed=true --numpy-rand-seed=1 --inference-only".split()
    )
    assert options.data_generation == "random"
    assert options.num_indices_per_lookup_fixed is True
    assert options.shape((10, 20, 30)).top == (32, 16, 1)


def test_a_file_decides_the_source() -> None:
    assert parse(["--raw-data-file", "x"]).data_generation == "dataset"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--arch-sparse-feature-size 8 --arch-mlp-bot 13-16", "ends in 16, but --arch-sparse-feature-size is 8"),
        ("--arch-mlp-bot 4-16", "begins with 4, but the data have 13"),
        ("--arch-mlp-bot 16", "at least two widths"),
        ("--arch-mlp-top 64-2", "ends in 2, wanted 1"),
        ("--predictions out.txt", "must end in .npy or .csv"),
        ("--max-ind-range 0", "wanted a number of rows"),
        ("--delay never", "is not understood"),
        ("--dist-backend gloo --input sharded", "wants --dist-backend bls"),
        ("--quiet 1:2s:1s", "wants --arrival-rate"),
        ("--quiet x --arrival-rate 5 --input sharded", "is not understood"),
        ("--rand-data-dist zipf", "zipf wants s above 0"),
        ("--rand-data-dist zipf:s=1,hot=3", "hot rows want a share"),
        ("--rand-data-dist cauchy", "is not understood"),
        ("--rand-data-dist gaussian:s=2", "gaussian has mu, sigma"),
        ("--loss-threshold 0.7", "is not between 0 and 0.5"),
        ("--table-kernel fbgemm", "wants --quantize-emb-with-bit 8 or 4"),
        ("--raw-data-file a --processed-data-file b", "give one of them"),
        ("--data-generation synthetic", "wants --data-trace-file"),
        ("--data-generation dataset", "wants --raw-data-file"),
        ("--data-generation random --raw-data-file x", "does not go with"),
    ],
)
def test_values_that_do_not_fit_together(line: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        parse(line.split())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--lag -1", "--lag: -1 is less than 0"),
        ("--lag x", "--lag: invalid"),
        ("--ranks 0", "0 is less than 1"),
        ("--arch-embedding-size 3-x", "is not a list of numbers"),
        ("--arch-embedding-size 3-0", "less than 1"),
        ("--timeout 0", "is not a time above 0"),
        ("--timeout nan", "is not a time above 0"),
        ("--qr-flag", "--qr-flag: QR embeddings: use plain ones"),
        ("--md-flag --md-threshold 3", "MD embeddings"),
        ("--nepochs=2", "only does inference"),
        ("--data-size 5", "--data-size: say it in batches"),
        ("--rand-data-mu=3", "say --rand-data-dist gaussian"),
        ("--dist-backend ccl", "invalid choice: 'ccl'"),
        ("--lags 3", "unrecognized"),
    ],
)
def test_flags_that_are_refused(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line.split())
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_help_shows_examples_and_no_refused_flag() -> None:
    text = flags.parser().format_help()
    assert "--ranks 4 --lag 3 --verify" in text
    assert "--qr-flag" not in text
