"""The feature net of emoji: what it takes, and that it tells emoji from what only looks a little like them."""

from types import SimpleNamespace

import pytest
import torch

from genkit.errors import UsageError
from genkit.evaluation.evaluate import _specs
from genkit.evaluation.subjects import suitable_net
from genkit.metrics import emoji_net, features
from genkit.metrics.frechet import Frechet


def test_net_is_the_file_it_was_published_as():
    net = features.load("emoji-cnn")
    assert net.sha256 == emoji_net.SHA256
    assert net.is_published
    assert net.class_names[0] == "faces"


@pytest.mark.parametrize("side", [32, 64, 100])
def test_any_square_size_gives_vectors(side):
    rows = features.load("emoji-cnn")(torch.rand(3, 3, side, side) * 2 - 1)
    assert rows.shape == (3, 192)
    assert rows.min() >= 0


def test_other_images_are_refused_in_one_line():
    for shape in ((1, 64, 64), (3, 256, 256), (3, 64, 256)):
        with pytest.raises(UsageError, match="use features=inception-2015"):
            features.load("emoji-cnn")(torch.zeros(1, *shape))


def test_colour_images_of_a_folder_are_not_taken_for_emoji():
    assert suitable_net((3, 64, 64), None, "emoji") == "emoji-cnn"
    assert suitable_net((3, 64, 64), None, "folder") == "inception-2015"
    assert suitable_net((3, 64, 64), "file", "emoji") == "inception-2015"


def test_metrics_that_are_named_without_a_net_take_one_that_suits_the_images():
    subject = SimpleNamespace(shape=(3, 64, 64), data={"type": "emoji"}, metrics=None, reference="train", kind="run")
    wanted = ["frechet", {"type": "kid"}, {"type": "frechet", "features": "inception-2015"}]
    nets = [spec["features"] for spec in _specs(subject, None, wanted, None, None)]
    assert nets == ["emoji-cnn", "emoji-cnn", "inception-2015"]


def test_distance_grows_with_blur():
    pytest.importorskip("PIL")
    from genkit.data.emoji import Emoji

    try:
        images = Emoji(size=64).pixels[:600].float() / 127.5 - 1
    except UsageError as error:  # no emoji font on this machine
        pytest.skip(str(error))
    values = []
    for kernel in (1, 3, 7):
        metric = Frechet(features="emoji-cnn")
        blurred = torch.nn.functional.avg_pool2d(images[1::2], kernel, 1, kernel // 2, count_include_pad=False)
        metric.update(real=images[::2], fake=blurred)
        values.append(next(iter(metric.result().values())))
    assert values[0] < values[1] < values[2]
