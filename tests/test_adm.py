"""The five numbers OpenAI's guided-diffusion publishes for its own samples, made again from its own files."""

import os
from pathlib import Path

import pytest

from genkit.errors import GenkitError
from genkit.evaluation.evaluate import evaluate
from genkit.metrics.features import locate

FOLDER = Path(os.environ.get("GENKIT_ADM", "~/.cache/genkit/adm")).expanduser()
SAMPLES, REFERENCE = "admnet_guided_upsampled_imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz"
# Of the README; a port to torch is off by as much as the tolerances (guided-diffusion, thread 159).
PUBLISHED = {
    "FID": (3.9426, 0.01),
    "sFID": (6.1404, 0.05),
    "IS": (215.837, 0.5),
    "precision": (0.8265, 0.005),
    "recall": (0.5309, 0.005),
}


def test_adm_numbers_are_its_own():
    missing = [name for name in (SAMPLES, REFERENCE) if not (FOLDER / name).is_file()]
    if missing:
        pytest.skip(f"{' and '.join(missing)} of openai/guided-diffusion are not in {FOLDER} (or $GENKIT_ADM)")
    try:
        locate("inception-2015")
    except GenkitError as error:
        pytest.skip(str(error))
    report = evaluate(FOLDER / SAMPLES, protocol="adm", reference=str(FOLDER / REFERENCE))
    for name, (value, tolerance) in PUBLISHED.items():
        assert report[name] == pytest.approx(value, abs=tolerance), name
