import hashlib
import json
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from golden_files import FOLDER, fill, load, relative
from PIL import Image
from scripts import fails_with_one_line, run

import fvd
from clips import open_clips
from runtime import UserError


@pytest.fixture(scope="module")
def i3d():
    state = fill(fvd.I3D(), "i3d.").state_dict()
    return filled(fvd.I3D(), {k: v * 2**0.5 if k.endswith("conv3d.weight") else v for k, v in state.items()})


def filled(model, state):
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def weights(i3d, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "i3d.pt"
    torch.save(i3d.state_dict(), path)
    return path


@pytest.fixture
def one_thread():
    """As in the scripts' processes: with more, some convolutions add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------------------
# I3D


def test_entries_are_the_released_ones(i3d):
    lines = (FOLDER / "checkpoint_keys" / "i3d_keys.txt").read_text().splitlines()
    released = {name: tuple(map(int, filter(None, shape.split("x")))) for name, shape in (x.split("\t") for x in lines)}
    assert len(released) == 344
    assert {name: tuple(value.shape) for name, value in i3d.state_dict().items()} == released


def test_golden_logits(i3d):
    golden = load("i3d")
    assert relative(fvd.features(i3d, golden["videos"].movedim(-1, 1)), golden["logits"]) < 1e-4


@pytest.mark.parametrize("size", range(4, 12))
def test_same_padding_of_every_length(size):
    """A window of k at stride s: zeros for (ceil(size / s) - 1) s + k places in all, the smaller half in front."""
    x = torch.rand(1, 1, size, size + 1, size + 2) + 1
    for kernel, stride in [
        ((7, 7, 7), (2, 2, 2)),
        ((1, 3, 3), (1, 2, 2)),
        ((2, 2, 2), (2, 2, 2)),
        ((3, 3, 3), (1,) * 3),
    ]:
        places = [-(-n // s) for n, s in zip(x.shape[2:], stride)]
        fronts = [max((m - 1) * s + k - n, 0) // 2 for n, m, k, s in zip(x.shape[2:], places, kernel, stride)]
        expected = torch.empty(places)
        for place in np.ndindex(*places):
            starts = [i * s - front for i, s, front in zip(place, stride, fronts)]
            window = tuple(slice(max(start, 0), start + k) for start, k in zip(starts, kernel))
            expected[place] = x[0, 0][window].max()
        assert torch.equal(fvd.max_pool(x, kernel, stride)[0, 0], expected)


def test_frames_are_sampled_one_by_one():
    """Half the side: the mean of two by two pixels; an antialias would take in their neighbours."""
    clips = torch.randint(256, (2, 3, 3, 448, 448), dtype=torch.uint8)
    expected = 2 * clips.double().unflatten(4, (224, 2)).unflatten(3, (224, 2)).mean((4, 6)) / 255 - 1
    assert (fvd.features(lambda x: x, clips) - expected).abs().max() < 1e-6


def test_float32_that_nothing_lowers(i3d):
    clip = torch.randint(256, (1, 3, 9, 32, 32), dtype=torch.uint8)
    seen = []
    hook = i3d.Mixed_5c.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = fvd.features(i3d, clip)
    hook.remove()
    assert torch.equal(lowered, fvd.features(i3d, clip)) and seen == [False]


def test_absent_and_other_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="VideoGPT") as error:
        fvd.load_i3d()
    assert str(tmp_path / "checkpoints" / "i3d_pretrained_400.pt") in str(error.value)
    with pytest.raises(UserError, match="there is no file"):
        fvd.load_i3d(tmp_path / "absent.pt")
    (tmp_path / "checkpoints").mkdir()
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "checkpoints" / "i3d_pretrained_400.pt")
    with pytest.raises(UserError, match="does not hold the I3D network"):
        fvd.load_i3d()


# ----------------------------------------------------------------------------------------------------------------------
# The distance


def test_golden_distances():
    golden = load("fvd")
    a, b = golden["a"], golden["b"]
    assert fvd.frechet_video_distance(a, b) == pytest.approx(golden["float64"].item(), rel=1e-6)
    assert fvd.frechet_video_distance(a.numpy(), b.numpy()) == pytest.approx(golden["float64"].item(), rel=1e-6)
    # One covariance is nearly singular, so that this hangs on roundings: on another kind of CPU it may be 1 % off.
    assert fvd.published_distance(a, b) == pytest.approx(golden["published_float32"].item(), rel=1e-3)


def test_distance_of_diagonal_gaussians():
    """|mu1 - mu2|^2 + sum (s1 - s2)^2, of samples that have these moments exactly: signs with orthogonal columns."""
    signs = torch.from_numpy(scipy.linalg.hadamard(64)[:, 1:17]).double() * (63 / 64) ** 0.5
    s1, s2, mu1, mu2 = torch.rand(4, 16, dtype=torch.float64) + 0.1
    a, b = mu1 + s1 * signs, mu2 + s2 * signs
    expected = ((mu1 - mu2).square() + (s1 - s2).square()).sum().item()
    assert fvd.frechet_video_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert fvd.published_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_published_way_takes_no_root_of_tiny_variances():
    """Of deviations 1e-6 and 2e-6: (1e-6 - 2e-6)^2; as published, where the root stays tiny, 1e-12 + 4e-12."""
    a = torch.tensor([[-1e-6], [1e-6]], dtype=torch.float64) / 2**0.5
    assert fvd.frechet_video_distance(a, 2 * a) == pytest.approx(1e-12, rel=1e-9)
    assert fvd.published_distance(a, 2 * a) == pytest.approx(5e-12, rel=1e-4)


def test_distance_refuses_one_clip_and_what_is_not_finite():
    good = torch.randn(5, 3)
    with pytest.raises(UserError, match="at least two pictures or clips"):
        fvd.frechet_video_distance(good, good[:1])
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match="not finite"):
            fvd.frechet_video_distance(good, good.clone().fill_(value))
    for scale in (1e15, 1e25):  # the product of covariances, and these themselves, overflow
        with pytest.raises(UserError, match="too large"):
            fvd.published_distance(scale * good, scale * good)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_one_process_and_two(tmp_path, i3d, weights, one_thread, monkeypatch):
    sets = [torch.randint(256, (count, 9, 20, 16, 3), dtype=torch.uint8) for count in (3, 2)]
    paths = [tmp_path / "reference.npz", tmp_path / "samples.npz"]
    np.savez(paths[0], arr_0=sets[0].numpy())
    np.savez_compressed(paths[1], arr_0=sets[1].numpy())
    flags = ["--i3d", weights, "--json", tmp_path / "out.json", "--batch", 1]
    printed = run("fvd.py", *paths, *flags, processes=2).stdout
    found = json.loads((tmp_path / "out.json").read_text())

    logits, features = [], fvd.features
    monkeypatch.setattr(fvd, "features", lambda *inputs: logits.append(features(*inputs)) or logits[-1])
    monkeypatch.setattr(sys, "argv", ["fvd.py", *map(str, [*paths, *flags])])
    fvd.main()
    assert torch.equal(logits[4], features(i3d, sets[1][1:].movedim(-1, 1)))
    a, b = torch.cat(logits[:3]), torch.cat(logits[3:])
    for numbers in (found, json.loads((tmp_path / "out.json").read_text())):
        assert numbers["FVD"] == pytest.approx(fvd.frechet_video_distance(a, b), rel=1e-9)
        assert numbers["FVD published"] == pytest.approx(fvd.published_distance(a, b), rel=1e-9)

    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    for words in ("reference.npz: 3 clips of 9x20x16", "2 clips of 9x20x16", sha256, "cpu x 2", "below 2048"):
        assert words in printed
    assert f"{'FVD':<15} {found['FVD']:.4f}" in printed
    assert sha256 in found["protocol"]["I3D"] and len(found["warnings"]) == 2


def save_frames(folder, count, height, width):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.effect_noise((width, height), 80).convert("RGB").save(folder / f"{number:02}.png")


def test_a_folder_is_the_clips_in_the_middle(tmp_path, monkeypatch):
    """Against an .npz of what clips.open_clips gives, of videos of unequal lengths and shapes; pixels for features."""
    for name, shape in {"a": (10, 24, 20), "b/c": (9, 20, 20), "b/d": (13, 20, 30)}.items():
        save_frames(tmp_path / "videos" / name, *shape)
    clips = open_clips(tmp_path / "videos", 16, 9, labelled=False)
    np.savez(tmp_path / "clips.npz", arr_0=torch.stack([clips[0, i][0] for i in range(3)]).movedim(1, -1))
    np.savez(tmp_path / "others.npz", arr_0=np.random.default_rng(0).integers(256, size=(2, 9, 16, 16, 3), dtype="u1"))
    monkeypatch.setattr(fvd, "load_i3d", lambda path: (torch.nn.Identity(), "none"))
    monkeypatch.setattr(fvd, "features", lambda i3d, clips: clips.flatten(1)[:, :6800:17].float())
    found = []
    for name in "videos", "clips.npz":
        flags = ["--json", tmp_path / "out.json", "--batch", 2, "--workers", 1, "--frames", 9, "--size", 16]
        words = ["fvd.py", tmp_path / name, tmp_path / "others.npz", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        fvd.main()
        found.append(json.loads((tmp_path / "out.json").read_text()))
    assert found[0]["FVD"] == found[1]["FVD"] > 0 and found[0]["FVD published"] == found[1]["FVD published"]
    assert found[0]["protocol"]["reference"] == f"{tmp_path / 'videos'}: 3 clips of 9x16x16, 0 unreadable"


def test_bad_sets_are_refused_in_one_line(tmp_path):
    clips = np.zeros((2, 9, 8, 8, 3), np.uint8)
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "unnamed.npz", clips=clips)
    np.savez(tmp_path / "float.npz", arr_0=clips / 255)
    np.savez(tmp_path / "pictures.npz", arr_0=clips[0])
    np.savez(tmp_path / "grey.npz", arr_0=clips[..., :1])
    np.savez(tmp_path / "single.npz", arr_0=clips[:1])
    np.savez(tmp_path / "short.npz", arr_0=clips[:, :8])
    (tmp_path / "text.npz").write_text("no clips")
    save_frames(tmp_path / "videos" / "a", 8, 9, 9)
    save_frames(tmp_path / "videos" / "b", 8, 9, 9)
    for name, words in [
        ("absent.npz", "there is no file"),
        ("folder", "holds no videos"),
        ("videos", "videos has 2 clips of 8x9x9; FVD takes 2 clips or more, of 9 frames"),
        ("unnamed.npz", "arr_0"),
        ("float.npz", "float64"),
        ("pictures.npz", r"clips are uint8, \(N, frames, height, width, 3\)"),
        ("grey.npz", "shape"),
        ("single.npz", "1 clips of 9x8x8; FVD takes 2 clips or more"),
        ("short.npz", "2 clips of 8x8x8; FVD takes 2 clips or more, of 9 frames"),
        ("text.npz", "not an .npz of clips"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            fvd.open_set(tmp_path / name, frames=8, size=9)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_sets_of_unequal_shape_end_the_command(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 9, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((2, 9, 8, 9, 3), np.uint8))
    line = fails_with_one_line("fvd.py", tmp_path / "a.npz", tmp_path / "b.npz")
    assert "2 clips of 9x8x8" in line and "2 clips of 9x8x9" in line
