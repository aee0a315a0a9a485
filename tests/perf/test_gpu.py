"""What a GPU gives: the speech encoder, and epochs of the session model against the same on two CPUs."""

import statistics
import time

import pytest
import torch
from perf_cases import BASE, DIMS, SPEECH_S, flops_per_second, noise_utterances, sessions
from tiny_models import write_speech_model

from vaemo.config import Config, FeatureConfig
from vaemo.features.speech import SpeechEncoder
from vaemo.model.scan import ScanNotAvailableError
from vaemo.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_encoder(tmp_path, precision):
    folder = write_speech_model(tmp_path / "base", "wavlm", **BASE)
    utterances = noise_utterances(3 * SPEECH_S)
    encoder = SpeechEncoder(FeatureConfig(speech=str(folder), speech_precision=precision), batch_s=240.0)
    encoder(utterances[:64])
    torch.cuda.synchronize()
    start = time.perf_counter()
    encoder(utterances)
    elapsed_s = time.perf_counter() - start
    total = sum(map(len, utterances)) / 16000
    flops = total * flops_per_second(encoder._model_config)
    print(
        f"\nWavLM-base-plus size, {precision}, {torch.cuda.get_device_name()}: {total / elapsed_s:.0f} x real time, "
        f"{flops / elapsed_s / 1e12:.1f} TFLOP/s"
    )
    assert total / elapsed_s > 500


def utterances_per_s(data, config, device):
    """Of training epochs, the median of three behind a first one; None where the scan cannot be had."""
    try:
        trainer = Trainer(data, data[:2], config, device=device)
        trainer.train_epoch(0)
    except ScanNotAvailableError:
        return None
    return statistics.median(trainer.train_epoch(epoch)["utterances_per_s"] for epoch in (1, 2, 3))


@pytest.mark.parametrize("lanes", [16, 256])
@pytest.mark.parametrize("updater", ["mamba", "mamba2"])
def test_epochs(updater, lanes):
    torch.set_num_threads(2)
    data = sessions(4 * lanes, 40, 60, DIMS)
    said = []
    for device, scan in (("cpu", "auto"), ("cuda", "chunk"), ("cuda", "kernel")):
        config = Config.load("default", [f"model.updater={updater}", f"train.lanes={lanes}", f"model.scan={scan}"])
        rate = utterances_per_s(data, config, device)
        said.append(f"{device} {scan} " + ("not to be had" if rate is None else f"{rate:,.0f}"))
    print(f"\n{updater}, {lanes} lanes, T 30, {torch.cuda.get_device_name()}, utterances/s: " + "; ".join(said))
