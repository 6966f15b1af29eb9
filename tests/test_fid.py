import json
import math
import tracemalloc
import urllib.request
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_files import checkpoint_keys, fill, load, relative
from PIL import Image
from scripts import fails_with_one_line, on_two_ranks, run
from torch.utils._python_dispatch import TorchDispatchMode

import fid
from inception import INCEPTION_ADDRESS, INCEPTION_FILE, load_inception, network_input, weights_in_words
from runtime import Runtime, UserError

ALONE = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def inception():
    model = fill(fid.InceptionV3())
    model.load_state_dict(model.state_dict() | load("inception_bn"))
    return model


@pytest.fixture(scope="module")
def weights(inception, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def golden():
    return load("metrics")


def moments(points):
    return points.mean(0), torch.cov(points.T)


# ----------------------------------------------------------------------------------------------------------------------
# Inception


def test_entries_are_the_released_ones(inception):
    ours = {name: (tuple(value.shape), value.dtype) for name, value in inception.state_dict().items()}
    assert ours == checkpoint_keys(INCEPTION_FILE)


def test_golden_features(inception, golden):
    images = golden["images_uint8_nchw"]
    pool, spatial, logits = inception(images)  # tf1 is the default
    assert relative(pool, golden["pool_2048_tf1_resize"]) < 1e-3
    maps = spatial.view(6, 17, 17, 7).permute(0, 3, 1, 2)
    assert relative(maps, golden["spatial_7x17x17_tf1_resize"]) < 1e-3
    assert relative(logits, golden["logits_unbiased_1008_tf1_resize"]) < 1e-3
    assert relative(logits + inception.fc.bias, golden["logits_1008_tf1_resize"]) < 1e-3
    half_pixel = golden["pool_2048_half_pixel_resize"]
    assert relative(inception(images, "half-pixel")[0], half_pixel) < 1e-3
    assert relative(inception(images[:2] / 255, "half-pixel")[0], half_pixel[:2]) < 1e-3


def sampled(image, size, shift):
    """Bilinear samples of (C, H, W) at (i + shift) * extent / size - shift, clamped to the picture."""

    def rows(image):  # and columns, of what is turned
        places = np.maximum((np.arange(size) + shift) * image.shape[1] / size - shift, 0)
        before = np.minimum(places.astype(int), image.shape[1] - 1)
        share = (places - before)[:, None]
        return image[:, before] * (1 - share) + image[:, np.minimum(before + 1, image.shape[1] - 1)] * share

    return rows(rows(image).swapaxes(1, 2)).swapaxes(1, 2)


@pytest.mark.parametrize("shape", [(40, 33), (400, 320)])  # enlarged; reduced, where an antialias would show
def test_both_conventions_sample_where_they_say(shape):
    image = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    batch = torch.from_numpy(image)[None]
    tf1 = (sampled(image.astype(float), 299, 0) - 128) / 128
    assert np.abs(network_input(batch, "tf1")[0].numpy() - tf1).max() < 1e-3
    half_pixel = 2 * sampled(image / 255, 299, 0.5) - 1
    assert np.abs(network_input(batch, "half-pixel")[0].numpy() - half_pixel).max() < 1e-3


def test_input_of_another_kind_is_refused(inception):
    with pytest.raises(ValueError, match="uint8"):
        inception(torch.zeros(1, 3, 8, 8), "tf1")
    with pytest.raises(ValueError, match="tf2"):
        inception(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "tf2")


def test_float32_that_nothing_lowers(inception, golden):
    image = golden["images_uint8_nchw"][:1]
    expected = inception(image)[0]
    seen = []
    hook = inception.Mixed_7c.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
    )
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, True
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(inception(image)[0], expected)
        assert seen == [(False, False)]
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32  # as they were
    finally:
        hook.remove()
        torch.backends.cuda.matmul.allow_tf32 = False


def test_weights_of_another_network_are_refused(inception, tmp_path):
    state = inception.state_dict()
    path = tmp_path / "other.pth"
    for wrong, words in [
        ({name: value for name, value in state.items() if name != "fc.bias"}, "fc.bias is missing"),
        (state | {"AuxLogits.fc.bias": torch.zeros(1)}, "AuxLogits.fc.bias is unexpected"),
        (state | {"fc.bias": torch.zeros(1000)}, "fc.bias has shape"),
        ([1, 2], "no state dict"),
    ]:
        torch.save(wrong, path)
        with pytest.raises(UserError, match=words):
            load_inception(path)


def test_weights_offline_and_absent(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(UserError) as error:
        load_inception()
    assert INCEPTION_ADDRESS in str(error.value)
    assert str(tmp_path / "checkpoints" / INCEPTION_FILE) in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Frechet distance


def test_frechet_golden(golden):
    for pair in ("ab", "cd"):
        a, b = (moments(golden[f"fid_{letter}"]) for letter in pair)
        assert fid.frechet_distance(*a, *b) == pytest.approx(golden[f"fid_{pair}"].item(), rel=1e-6)
        assert fid.frechet_distance(*b, *a) == pytest.approx(golden[f"fid_{pair}"].item(), rel=1e-6)


def test_frechet_of_commuting_gaussians():
    """Covariances with common axes Q: |mu1 - mu2|^2 + sum (s1_i - s2_i)^2 over the deviations along them."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    s1, s2 = rng.uniform(0, 3, 30), rng.uniform(0, 3, 30)
    mu1, mu2 = rng.standard_normal((2, 30))
    expected = ((mu1 - mu2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    ours = fid.frechet_distance(mu1, axes * s1**2 @ axes.T, mu2, axes * s2**2 @ axes.T)
    assert ours == pytest.approx(expected, rel=1e-12)


def test_frechet_is_exact_where_covariances_lack_rank():
    """Of two rank-one covariances a a^T and b b^T: |a|^2 + |b|^2 - 2 |a.b|. Of the identity and b b^T: D +
    |b|^2 - 2 |b|. With root eigenvalues taken of a D x D product the zero ones would add about 1e-8 each."""
    a, b = np.random.default_rng(0).standard_normal((2, 400))
    zero = np.zeros(400)
    ours = fid.frechet_distance(zero, np.outer(a, a), zero, np.outer(b, b))
    assert ours == pytest.approx(a @ a + b @ b - 2 * abs(a @ b), rel=1e-13)
    expected = 400 + b @ b - 2 * np.sqrt(b @ b)
    assert fid.frechet_distance(zero, np.eye(400), zero, np.outer(b, b)) == pytest.approx(expected, rel=1e-13)
    assert fid.frechet_distance(zero, np.outer(b, b), zero, np.eye(400)) == pytest.approx(expected, rel=1e-13)


def test_frechet_of_a_set_with_itself_is_zero_and_not_less(golden):
    for name in "abcd":
        distance = fid.frechet_distance(*moments(golden[f"fid_{name}"]), *moments(golden[f"fid_{name}"]))
        assert 0 <= distance < 1e-9


def test_frechet_where_torch_gives_up(monkeypatch):
    """As it does on a GPU, and with MKL, for a covariance that has one eigenvalue many times."""
    a, b = torch.randn(2, 40, 16, dtype=torch.float64)
    sets = (a.mean(0), a.T.cov(), 2 * b.mean(0), 3 * b.T.cov())
    expected = fid.frechet_distance(*sets)

    def give_up(*_):
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    assert fid.frechet_distance(*sets) == pytest.approx(expected, rel=1e-12)


def test_frechet_refuses_what_is_not_finite():
    with pytest.raises(UserError, match="finite"):
        fid.frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.nan))


# ----------------------------------------------------------------------------------------------------------------------
# Inception Score


def test_inception_score_golden(golden):
    for name, size in [("one_split", 5000), ("splits_of_500", 500)]:
        expected = golden[f"inception_score_{name}"].item()
        assert fid.inception_score(golden["probs"], size)[0] == pytest.approx(expected, rel=1e-9)


def test_inception_score_closed_forms():
    uniform, one_hot = np.full((40, 8), 1 / 8), np.tile(np.eye(8), (5, 1))
    assert fid.inception_score(uniform) == pytest.approx((1, 0), abs=1e-12)
    assert fid.inception_score(one_hot) == pytest.approx((8, 0), abs=1e-12)
    # Splits that score 8, 1, and a short last one with 2 classes: 2. All three weigh the same.
    mean, deviation = fid.inception_score(np.concatenate([one_hot, uniform, np.eye(8)[:2]]), 40)
    assert mean == pytest.approx(11 / 3, rel=1e-12)
    assert deviation == pytest.approx(np.std([8, 1, 2]), rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Precision and recall


def grid(places):
    return np.stack(np.meshgrid(places, places), 2).reshape(-1, 2)


def line(*places):
    return np.array(places, dtype=float)[:, None]


def test_precision_recall_golden(golden):
    expected = golden["precision"].item(), golden["recall"].item()
    assert fid.precision_recall(golden["pr_ref"], golden["pr_gen"]) == expected


def test_precision_recall_golden_in_small_blocks(golden, monkeypatch):
    monkeypatch.setattr(fid.distance_blocks, "__defaults__", (777,))  # blocks of three and four rows
    assert [rows for rows, *_ in fid.distance_blocks(golden["pr_ref"], golden["pr_gen"])][1] == slice(4, 8)
    expected = golden["precision"].item(), golden["recall"].item()
    assert fid.precision_recall(golden["pr_ref"], golden["pr_gen"]) == expected


@pytest.mark.parametrize("copies, others", [(1, 1), (2, 2), (6, 4), (4, 6)])
def test_identical_sets(copies, others):
    """With four copies of a point and more every radius is zero; rounding of the distances must not matter."""
    points = np.random.default_rng(0).standard_normal((50, 2048)).astype(np.float32)
    reference, generated = np.tile(points, (copies, 1)), np.tile(points, (others, 1))[::-1].copy()
    assert fid.precision_recall(reference, generated) == (1, 1)


def test_disjoint_and_nested_sets():
    wide, narrow = grid(np.arange(-10.0, 11)), grid(np.arange(-2, 2.25, 0.5))
    assert fid.precision_recall(wide, wide + 100) == (0, 0)
    # The narrow balls reach 0.5, at the corners 0.71: of the wide points they hold the 25 at their centres.
    assert fid.precision_recall(wide, narrow) == (1, 25 / 441)
    assert fid.precision_recall(narrow, wide) == (25 / 441, 1)


def test_a_ball_holds_its_rim():
    reference = line(0, 1, 2, 3)  # k = 1: all radii are 1
    assert fid.precision_recall(reference, line(4, 4.0001, 50, 60), k=1)[0] == 0.25
    assert fid.precision_recall(line(4, 4.0001, 50, 60), reference, k=1)[1] == 0.25


def test_the_point_itself_is_no_neighbour():
    # k = 2 from 0: the neighbours are 1 and 3, so the ball ends at 3.
    reference = line(0, 1, 3, 100, 101, 103)
    assert fid.precision_recall(reference, line(-3, -3.01, 500, 600), k=2)[0] == 0.25


def test_precision_recall_needs_more_points_than_neighbours():
    with pytest.raises(UserError, match="more than 3 pictures"):
        fid.precision_recall(np.zeros((3, 5)), np.zeros((9, 5)))


def test_precision_recall_memory_is_bounded(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    monkeypatch.setattr(fid.distance_blocks, "__defaults__", (2**13,))
    points = np.random.default_rng(0).standard_normal((2, 1000, 4))
    with Largest() as seen:
        fid.precision_recall(*points)
    assert seen.numel <= 2**13  # of 1,000,000 distances


# ----------------------------------------------------------------------------------------------------------------------
# PSNR and SSIM


def test_psnr_and_ssim_golden(golden):
    pair = golden["images_uint8_nchw"], golden["noisy_uint8_nchw"]
    assert (fid.psnr(*pair) - golden["psnr_per_image"]).abs().max() < 2e-6
    assert (fid.ssim(*pair) - golden["ssim_per_image"]).abs().max() < 1e-6


def test_psnr_of_one_level():
    black = torch.zeros(3, 3, 9, 9, dtype=torch.uint8)
    other = black.clone()
    other[1] += 1  # a mean squared error of 1 level^2
    other[2, :, 0] += 255  # a ninth of the picture wrong altogether
    expected = [math.inf, 20 * math.log10(255), 10 * math.log10(9)]
    assert fid.psnr(black, other).tolist() == pytest.approx(expected, rel=1e-12)


def test_ssim_is_the_formula():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (1, 2, 9, 8), dtype=np.uint8)
    y = np.clip(x + rng.integers(-40, 40, x.shape), 0, 255).astype(np.uint8)
    values = []
    for channel in range(2):
        for i in range(3):
            for j in range(2):
                a, b = (z[0, channel, i : i + 7, j : j + 7].ravel() / 255 for z in (x, y))
                (va, cov), (_, vb) = np.cov(a, b)  # sample covariances
                value = (2 * a.mean() * b.mean() + 1e-4) * (2 * cov + 9e-4)
                values.append(value / ((a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (va + vb + 9e-4)))
    ours = fid.ssim(torch.from_numpy(x), torch.from_numpy(y))
    assert ours.item() == pytest.approx(np.mean(values), rel=1e-9)
    assert fid.ssim(torch.from_numpy(x), torch.from_numpy(x)).item() == pytest.approx(1, rel=1e-12)
    with pytest.raises(UserError, match="7x7"):
        fid.ssim(torch.zeros(1, 3, 6, 9), torch.zeros(1, 3, 6, 9))


# ----------------------------------------------------------------------------------------------------------------------
# Moments


def test_moments_far_from_zero():
    """An offset of a million deviations: sums of squares minus squares of sums would be lost in rounding."""
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((20_100, 5))) + 1e6
    mean, covariance = fid.moments(points)
    assert np.allclose(mean, points.mean(0), rtol=1e-14)
    assert np.allclose(covariance, torch.cov(points.T), rtol=1e-8, atol=1e-9)


def test_one_picture_has_no_covariance():
    with pytest.raises(UserError, match="at least two"):
        fid.moments(torch.zeros(1, 2))


# ----------------------------------------------------------------------------------------------------------------------
# Sets of pictures


def pictures_of(opened):
    return torch.stack([opened.pictures[0, index][0] for index in range(len(opened.pictures))])


def write_folder(folder, images):
    """Pictures (N, 3, H, W) in two levels of folders, in the order of their names."""
    for number, image in enumerate(images):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return torch.cat([images[0::2], images[1::2]])


def channels_last(images):
    return images.permute(0, 2, 3, 1).numpy()


def test_npz_and_folder_give_the_pictures(tmp_path, golden):
    images = golden["images_uint8_nchw"]
    in_order = write_folder(tmp_path / "folder", images)
    np.savez(tmp_path / "plain.npz", labels=np.arange(6), arr_0=channels_last(images))
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=channels_last(images))
    assert torch.equal(pictures_of(fid.PictureSet(ALONE, tmp_path / "folder")), in_order)
    plain = fid.PictureSet(ALONE, tmp_path / "plain.npz")
    assert torch.equal(pictures_of(plain), images)
    assert isinstance(plain.pictures.array, np.memmap)  # not read as a whole
    assert torch.equal(pictures_of(fid.PictureSet(ALONE, tmp_path / "compressed.npz")), images)


def bad_inputs(tmp_path):
    """What a user may get wrong: (path, words of the message)."""
    grey = np.zeros((4, 8, 8, 3), np.uint8)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no picture")
    (tmp_path / "mixed").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed" / "a.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "mixed" / "b.png")
    np.savez(tmp_path / "unnamed.npz", pictures=grey)
    np.savez(tmp_path / "float.npz", arr_0=grey / 255)
    np.savez(tmp_path / "flat.npz", arr_0=grey[0])
    np.savez(tmp_path / "none.npz", arr_0=grey[:0])
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{}], dtype=object))
    np.savez(tmp_path / "moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "whole.npz", arr_0=grey)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-100])
    np.save(tmp_path / "single.npy", grey)
    return [
        ("absent", "there is no file"),
        ("empty", "no pictures"),
        ("text", "no pictures"),
        ("mixed", "a.png is 8x8, b.png is 9x8"),
        ("unnamed.npz", "arr_0"),
        ("float.npz", "float64"),
        ("flat.npz", "shape"),
        ("none.npz", "shape"),
        ("pickle.npz", "arr_0 of .* is object"),
        ("moments.npz", r"mu of shape \(2048,\)"),
        ("cut.npz", "damaged: File is not a zip file"),
        ("single.npy", "not an .npz"),
    ]


def test_bad_sets_are_refused_in_one_line(tmp_path):
    for name, words in bad_inputs(tmp_path):
        with pytest.raises(UserError, match=words) as error:
            fid.PictureSet(ALONE, tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_bad_set_ends_the_command(tmp_path):
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((4, 8, 8, 3)))
    assert "float64" in fails_with_one_line("fid.py", tmp_path / "float.npz", tmp_path / "float.npz")


def test_an_unreadable_picture_is_counted_and_too_many_stop(tmp_path):
    write_folder(tmp_path, torch.zeros(120, 3, 8, 8, dtype=torch.uint8))

    def network(images, convention):  # stands in for Inception, which would take a minute
        return torch.ones(len(images), 2048), torch.ones(len(images), 2023), None

    (tmp_path / "a" / "0.png").write_bytes(b"no picture")
    args = SimpleNamespace(convention="tf1", batch=50, workers=0)
    picture_set = fid.PictureSet(ALONE, tmp_path)
    fid.measure(ALONE, picture_set, network, args)
    assert (picture_set.count, len(picture_set.stats["pool"])) == (119, 119)
    assert picture_set.words == "119 pictures 8x8, 1 unreadable ones left out"
    (tmp_path / "b" / "1.png").write_bytes(b"no picture either")
    with pytest.raises(UserError, match="more than 1%"):
        fid.measure(ALONE, fid.PictureSet(ALONE, tmp_path), network, args)


def test_statistics_of_other_conventions_and_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fid, "frechet_distance", lambda *moments: 0.0
    )  # takes half a minute here, and is not in question
    mu, sigma = np.zeros(2048), np.eye(2048, dtype=np.float32)
    np.savez(tmp_path / "pytorch_fid.npz", mu=mu, sigma=sigma)
    space = {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023, dtype=np.float32)}
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, **space)
    np.savez(tmp_path / "own.npz", mu=mu, sigma=sigma, **space, convention="half-pixel", inception="abc")
    for name, convention, other in [("adm", "tf1", "half-pixel"), ("own", "half-pixel", "tf1")]:
        stored = fid.PictureSet(ALONE, tmp_path / f"{name}.npz")
        stored.check(convention, "abc")
        with pytest.raises(UserError, match=f"--convention {convention}, not {other}"):
            stored.check(other, "abc")
    with pytest.raises(UserError, match="other Inception weights"):
        stored.check("half-pixel", "abd")
    assert fid.compare(stored, stored, None)[1] == []
    stored = fid.PictureSet(ALONE, tmp_path / "pytorch_fid.npz")
    for convention in ("tf1", "half-pixel"):  # the file says neither: what the user says holds
        stored.check(convention, "abc")
    assert "does not say its convention" in fid.compare(stored, stored, None)[1][0]


def statistics(count=6, **changes):
    """The arrays of a saved set."""
    rng = np.random.default_rng(0)
    pool = rng.random((count, 2048), np.float32)
    moments = {"mu": pool.mean(0), "sigma": np.eye(2048, dtype=np.float32)}
    moments |= {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023, dtype=np.float32)}
    return moments | {"pool": pool, "size": np.array((8, 8)), "convention": "tf1", "inception": "abc"} | changes


def test_an_npz_unpacks_only_what_is_asked_for(tmp_path):
    """An entry of a gigabyte, or one that is not as long as its header says, in a file of a megabyte."""
    bomb = tmp_path / "bomb.npz"
    for name, shape, words in [
        ("junk", (2**30,), None),
        ("sigma", (2**30,), "sigma of shape"),
        ("arr_0", (2**40, 8, 8, 3), "not as long as its header says"),
        ("pool", (2**40, 2048), "not as long as its header says"),
    ]:
        np.savez(bomb, **{key: value for key, value in statistics().items() if key != name})
        with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for _ in range(32):
                file.write(bytes(2**20))
        tracemalloc.start()
        if words:
            with pytest.raises(UserError, match=words):
                fid.PictureSet(ALONE, bomb)
        else:
            assert fid.PictureSet(ALONE, bomb).count == 6
        assert tracemalloc.get_traced_memory()[1] < 200e6
        tracemalloc.stop()


def test_statistics_that_are_not_finite_or_of_other_types_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    for name in ("mu", "sigma", "mu_s", "sigma_s", "pool"):
        wrong = statistics()[name].copy()
        wrong.flat[-1] = np.nan if name != "mu" else np.inf
        np.savez(path, **statistics(**{name: wrong}))
        with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
            fid.PictureSet(ALONE, path)
    for changes in ({"mu": np.full(2048, "x")}, {"size": np.array(8)}, {"convention": np.array([{}], object)}):
        np.savez(path, **statistics(**changes))
        with pytest.raises(UserError, match="x.npz"):
            fid.PictureSet(ALONE, path)
    np.savez(path, **statistics(names=np.array(["a"], object), mu=np.zeros(2048, ">f4")))  # the rest is fine
    assert fid.PictureSet(ALONE, path).count == 6


def test_numbers_are_never_nan(tmp_path, monkeypatch):
    np.savez(tmp_path / "good.npz", **statistics())
    np.savez(tmp_path / "huge.npz", **statistics(mu=np.full(2048, 1e200)))
    good, huge = (fid.PictureSet(ALONE, tmp_path / f"{name}.npz") for name in ("good", "huge"))
    with pytest.raises(UserError, match="not finite, or huge"):
        fid.compare(good, huge, torch.zeros(1008, 2048))
    monkeypatch.setattr(fid, "frechet_distance", lambda *_: 0.0)
    with pytest.raises(UserError, match="IS is nan"):
        fid.compare(good, good, torch.full((1008, 2048), math.nan))
    with pytest.raises(UserError, match="features are not finite"):
        fid.moments(torch.tensor([[1.0, math.inf], [1.0, 1.0]]))
    with pytest.raises(UserError, match="not finite"):
        fid.gather_rows(ALONE, [torch.full((1, 2), math.nan)], 2)


def nan_on_the_second(rank):
    rt = Runtime(torch.device("cpu"), rank, world=2)
    with pytest.raises(UserError, match="not finite"):
        fid.gather_rows(rt, [torch.full((1, 2), math.nan if rank else 0.0)], 2)


def test_nan_on_one_rank_ends_all(tmp_path):
    on_two_ranks(nan_on_the_second, tmp_path)


def test_a_short_last_split_is_warned_about(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "precision_recall", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(fid, "frechet_distance", lambda *_: 0.0)
    for count, warned in ((5000, False), (5001, True)):
        np.savez(tmp_path / "x.npz", **statistics(count))
        stats = fid.PictureSet(ALONE, tmp_path / "x.npz")
        _, warnings = fid.compare(stats, stats, torch.zeros(2, 2048))
        assert any("last split of IS has 1 pictures" in words for words in warnings) == warned


def test_only_the_published_weights_pass_for_such():
    assert "(the published file)" in weights_in_words("6726825d" + 56 * "0")
    assert "NOT the published" in weights_in_words("6726825e" + 56 * "0")


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def one_thread():
    """As in the scripts' processes: with more, some convolutions add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_statistics_saved_by_three_processes(tmp_path, inception, weights, golden, one_thread):
    images = write_folder(tmp_path / "set", golden["images_uint8_nchw"][:2])  # none for the third process
    flags = ["--inception", weights, "--save-stats", tmp_path / "stats.npz", "--batch", 1, "--workers", 1]
    run("fid.py", tmp_path / "set", *flags, processes=3)
    pool, spatial, _ = inception(images)
    saved = fid.PictureSet(ALONE, tmp_path / "stats.npz")
    assert (saved.stats["convention"], saved.count, saved.stats["size"]) == ("tf1", 2, (80, 72))
    saved.check("tf1", load_inception(weights)[1])
    assert relative(torch.from_numpy(saved.stats["pool"]), pool) < 1e-6
    truth = (*moments(pool.double()), *moments(spatial.double()))
    for name, expected in zip(("mu", "sigma", "mu_s", "sigma_s"), truth):
        assert relative(torch.from_numpy(saved.stats[name]), expected) < 1e-6


def test_adm_reference_against_an_npz_on_two_processes(tmp_path, inception, weights, golden, one_thread):
    """Stored moments serve FID and sFID, though the pictures beside them have others; these serve precision, recall."""
    images, noisy = golden["images_uint8_nchw"], golden["noisy_uint8_nchw"]
    samples = torch.cat([noisy, images[:1].flip(3)])  # seven: the shares are uneven
    space = {"mu_s": np.full(2023, 0.2), "sigma_s": 4 * np.eye(2023)}
    reference = {"mu": np.full(2048, 0.1), "sigma": np.eye(2048), **space}
    np.savez(tmp_path / "adm.npz", arr_0=channels_last(images), **reference)
    np.savez(tmp_path / "samples.npz", arr_0=channels_last(samples))
    flags = ["--inception", weights, "--json", tmp_path / "out.json", "--batch", 3]
    printed = run("fid.py", tmp_path / "adm.npz", tmp_path / "samples.npz", *flags, processes=2).stdout
    found = json.loads((tmp_path / "out.json").read_text())

    pool, spatial, logits = (values.double() for values in inception(samples))

    def distance_to(place, variance, points):
        """From N(place, variance * identity): the root's trace is sqrt(variance) * sum of the samples' deviations along
        their principal axes, of which there are fewer than samples."""
        centred = (points - points.mean(0)) / math.sqrt(len(points) - 1)
        deviations = torch.linalg.eigvalsh(centred @ centred.T)[1:].sqrt()  # the first is zero
        distance = (points.mean(0) - place).square().sum() + variance * points.shape[1]
        return (distance + deviations.square().sum() - 2 * math.sqrt(variance) * deviations.sum()).item()

    assert found["FID"] == pytest.approx(distance_to(0.1, 1, pool), rel=1e-6)
    assert found["sFID"] == pytest.approx(distance_to(0.2, 4, spatial), rel=1e-6)
    p = logits.softmax(1)
    score = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()
    assert found["IS"] == pytest.approx(score, rel=1e-6)
    features = inception(images)[0].double()
    across = torch.cdist(features, pool)
    radii = [torch.cdist(points, points).sort(1).values[:, 3] for points in (features, pool)]
    assert found["precision"] == (across <= radii[0][:, None]).any(0).double().mean().item()
    assert found["recall"] == (across <= radii[1]).any(1).double().mean().item()

    sha256 = load_inception(weights)[1]
    for words in ("stored moments, 6 pictures 72x80", "7 pictures 72x80", "tf1", sha256, "cpu x 2", "below 2048"):
        assert words in printed
    assert f"{'FID':<15} {found['FID']:.4f}" in printed
    assert sha256 in found["protocol"]["inception"] and len(found["warnings"]) == 1


def test_flags_are_checked_before_any_work(tmp_path):
    assert "cannot write" in fails_with_one_line("fid.py", tmp_path, tmp_path, "--json", tmp_path / "no" / "a.json")
    assert "it is a folder" in fails_with_one_line("fid.py", tmp_path, tmp_path, "--json", tmp_path)
    assert "cannot write" in fails_with_one_line("fvd.py", "a", "b", "--json", tmp_path / "no" / "a.json")
    for flags in (["a"], ["a", "b", "--batch", "0"], ["a", "b", "--convention", "tf2"]):
        with pytest.raises(SystemExit) as stop:
            fid.parse(flags)
        assert stop.value.code == 2
