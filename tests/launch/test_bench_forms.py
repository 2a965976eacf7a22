"""The textbook forms that `nsi bench decoder` and `nsi bench step` measure against compute what ours do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.bench import BenchConfig, run
from launch.benches import decoder, forms, step
from launch.benches.decoder import TextbookDecoder
from launch.benches.step import textbook_contrastive
from nsi.decoder import BroadcastDecoder
from nsi.errors import UsageError
from nsi.loss import Rows, contrastive_sum
from nsi.noise import KeyedNoise
from tests.gloo.problem import TAU, G, make_batch, make_model

ROOT = Path(__file__).parents[2]


def test_the_textbook_decoder_is_the_decoder() -> None:
    torch.manual_seed(0)
    decoder = BroadcastDecoder(6, 5, 9, 8, 3).double()
    textbook = TextbookDecoder(decoder)
    results = []
    for form in (decoder, textbook):
        slots_BND = torch.linspace(-1, 1, 2 * 4 * 6, dtype=torch.float64).view(2, 4, 6).requires_grad_()
        reconstruction_BPF, alphas_BNP = form(slots_BND)
        (reconstruction_BPF.sin().sum() + alphas_BNP.square().sum()).backward()
        results.append((reconstruction_BPF, alphas_BNP, slots_BND.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_textbook_loss_is_the_loss() -> None:
    batch, features_GPF = make_batch()
    ids_G = torch.arange(G)  # distinct scenes
    model = make_model(0.0).double()
    output = model(
        features_GPF.double(), batch.labels_BT3, batch.positions_BT3, batch.objects_BT, KeyedNoise(0, 0, ids_G)
    )
    rows = Rows(
        output.slot_embeddings_BNE, output.primitive_embeddings_BTE, batch.objects_BT, ids_G, torch.ones(G).bool()
    )
    ours = contrastive_sum(rows, lambda tensor: tensor, 0, TAU) / G
    torch.testing.assert_close(textbook_contrastive(output, batch.objects_BT, ids_G), ours, rtol=1e-12, atol=0)


def test_memory_is_what_a_run_takes() -> None:
    code = "from launch.benches.forms import peak_mib; import torch; print(peak_mib(lambda: torch.ones(64 << 20)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(found.stdout) == pytest.approx(256, rel=0.05)


@pytest.mark.parametrize("suite", [decoder, step])
def test_every_form_runs(suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """On little, and without the processes that measure memory at full size."""
    for name, value in {"IMAGES": 2, "PATCHES": 9, "FEATURES": 12}.items():
        monkeypatch.setattr(suite, name, value)
    monkeypatch.setattr(forms, "_peak_elsewhere", lambda module, form: 1.0)
    found = list(suite.comparisons(None, 0))
    name = suite.__name__.removeprefix("launch.benches.")
    expected = [f"{name}/{what}" for what in ("time", "memory", "time-recompute", "memory-recompute")]
    assert [each.name for each in found] == expected
    assert all(each.ratio > 0 for each in found)


def test_data_mean_nothing_there(tmp_path: Path) -> None:
    for what in ("decoder", "step"):
        with pytest.raises(UsageError, match="reads no data"):
            run(BenchConfig(what, data=tmp_path))  # type: ignore[arg-type]
