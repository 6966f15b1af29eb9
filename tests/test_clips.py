import itertools
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from golden_files import load
from PIL import Image

import clips
import data
from runtime import UserError


def moving(count, height=64, width=64, seed=0):
    """Frames that all differ: a window that moves over coloured tiles, uint8 (count, H, W, 3)."""
    tiles = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    ground = tiles.repeat(8, 0).repeat(8, 1)
    return np.stack([ground[i : i + height, 2 * i : 2 * i + width] for i in range(count)])


def save_video(path, frames, codec="mpeg4", pixels="yuv420p", gop=12, times=None, sound=False, **options):
    """times: of the frames, in milliseconds, instead of 25 a second."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    index_first = {"movflags": "faststart"} if path.suffix == ".mov" else {}
    with av.open(str(path), "w", options=index_first) as video:
        stream = video.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *frames.shape[1:3], pixels, gop
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        audio = video.add_stream("aac", rate=8000, layout="mono") if sound else None
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            if times:
                picture.pts, picture.time_base = times[i], Fraction(1, 1000)
            video.mux(stream.encode(picture))
        video.mux(stream.encode())
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.rate = 8000
            video.mux(audio.encode(silence))
            video.mux(audio.encode())
    return path


def decoded(path):
    """All frames, from the start on."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def frames_of(clip):
    """uint8 (3, T, S, S) -> (T, S, S, 3)"""
    return clip.permute(1, 2, 3, 0).numpy()


def reason(folder, **options):
    """Why the one clip in a folder cannot be read."""
    with pytest.raises(UserError, match="^not one of the first 1 videos in .* can be read; ") as error:
        clips.open_clips(folder, 64, labelled=False, **options)
    assert "\n" not in str(error.value)
    return str(error.value).split("can be read; ")[1]


# --- Pixels -----------------------------------------------------------------------------------------------------------
def test_golden_resize():
    golden = load("resize_cv2")
    assert np.array_equal(clips.resize_frame(golden["frame"].numpy(), 128), golden["resized"].numpy())


def one_pixel(frame, y, x, height, width):
    """OpenCV's, one by one: float32 places, columns in 11 bits, then rows."""

    def beside(i, count, new_count):
        place = np.float32((i + 0.5) * count / new_count - 0.5)
        first = int(np.floor(place))
        return first, place - np.float32(first)

    column, f = beside(x, frame.shape[1], width)
    if column < 0 or column + 1 >= frame.shape[1]:
        column, f = max(column, 0), np.float32(0)
    row, g = beside(y, frame.shape[0], height)
    sums = []
    for line in row, row + 1:
        line = frame[min(max(line, 0), len(frame) - 1)].astype(int)
        beyond = line[min(column + 1, len(line) - 1)]
        sums.append(line[column] * round(2048 * float(1 - f)) + beyond * round(2048 * float(f)))
    upper, lower = (round(2048 * float(share)) * (total >> 4) >> 16 for share, total in zip((1 - g, g), sums))
    return upper + lower + 2 >> 2


@pytest.mark.parametrize("shape, side", [((24, 32), 13), ((37, 21), 20), ((5, 9), 16), ((7, 4), 31), ((1, 3), 6)])
def test_resize_one_pixel_after_the_other(shape, side):
    """Also enlarged, where OpenCV gives places beyond the border their own weights in rows, but not in columns."""
    frame = np.random.default_rng(side).integers(0, 256, (*shape, 3), dtype=np.uint8)
    resized = clips.resize_frame(frame, side)
    height, width = (int(side * pixels / min(shape)) for pixels in shape)
    assert resized.shape == (height, width, 3) and resized.dtype == np.uint8
    slow = [[one_pixel(frame, y, x, height, width) for x in range(width)] for y in range(height)]
    assert np.array_equal(resized, slow)


def test_resize_to_the_same_and_to_half():
    frame = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    assert np.array_equal(clips.resize_frame(frame, 12), frame)
    quarters = frame.reshape(6, 2, 10, 2, 3).astype(int).sum((1, 3))
    assert np.array_equal(clips.resize_frame(frame, 6), (quarters + 2) // 4)


def places(folder, height, width, count=9):
    """A folder of frames in which a pixel's values are its row, its column, and the frame's number."""
    folder.mkdir(parents=True)
    for i in range(count):
        rows, columns = np.mgrid[:height, :width].astype(np.uint8)
        Image.fromarray(np.stack([rows, columns, np.full_like(rows, i)], -1)).save(folder / f"{i:03}.png")
    (folder / "._000.png").write_bytes(b"hidden")


def test_a_clip_has_one_crop_and_frames_from_one_place_on(tmp_path):
    places(tmp_path / "wide", 16, 18)
    places(tmp_path / "high", 18, 16)

    def of(train, index, seed=0):
        found, dataset = [], clips.open_clips(tmp_path, 16, 7, train, seed, labelled=False)
        for epoch in range(60 if train else 3):
            clip, _ = dataset[epoch, index]
            assert clip.shape == (3, 7, 16, 16) and clip.dtype == torch.uint8 and clip.is_contiguous()
            top, left, first = clip[:, 0, 0, 0].tolist()
            rows, columns, numbers = clip.int()
            assert (rows == top + torch.arange(16)[:, None]).all() and (columns == left + torch.arange(16)).all()
            assert (numbers == first + torch.arange(7)[:, None, None]).all()
            found.append((first, top, left))
        return found

    high, wide = of(True, 0), of(True, 1)
    assert set(high) == set(itertools.product(range(3), range(3), [0]))
    assert set(wide) == set(itertools.product(range(3), [0], range(3)))
    assert high == of(True, 0) != of(True, 0, seed=1) and [h[1] for h in high] != [w[2] for w in wide]
    middles = [of(False, 1, seed) for seed in range(12)]
    assert all(len(set(same)) == 1 for same in middles)  # in every epoch
    assert {same[0] for same in middles} == {(9 // 2 - 7 // 2, 0, left) for left in range(3)}


@pytest.mark.parametrize("count, length, first", [(17, 17, 0), (18, 17, 1), (29, 17, 6), (30, 17, 7), (5, 4, 0)])
def test_the_middle(tmp_path, count, length, first):
    places(tmp_path / "clip", 8, 8, count)
    clip, _ = clips.open_clips(tmp_path, 8, length, labelled=False)[0, 0]
    assert clip[2, :, 0, 0].tolist() == list(range(first, first + length))


@pytest.mark.parametrize("train, found", [(False, {0}), (True, {0, 1, 2, 3})])
def test_the_first(tmp_path, train, found):
    """Not in training, where frames stay random. The crop is that of the middle."""
    places(tmp_path / "clip", 8, 12, 10)
    dataset = clips.open_clips(tmp_path, 8, 7, train, labelled=False, first=True)
    firsts = [dataset[epoch, 0][0][2, :, 0, 0].tolist() for epoch in range(30)]
    assert {first[0] for first in firsts} == found and all(np.diff(first).tolist() == [1] * 6 for first in firsts)
    middle = clips.open_clips(tmp_path, 8, 7, train, labelled=False)
    assert torch.equal(dataset[0, 0][0][:2], middle[0, 0][0][:2])


def test_whole_videos(tmp_path):
    """Each of its own length, and at the same crop as its middle frames."""
    save_video(tmp_path / "a.mkv", moving(20, 40, 48), "ffv1", "bgr0")
    animate(tmp_path / "b.webp", moving(7, 48, 40), lossless=True)
    places(tmp_path / "c", 32, 40, 11)
    whole = clips.open_clips(tmp_path, 32, frames=None, labelled=False, seed=3)
    assert whole.shape is None
    for index, count in enumerate((20, 7, 11)):
        clip, _ = whole[0, index]
        assert clip.shape == (3, count, 32, 32) and clip.is_contiguous()
        assert torch.equal(clip, clips.open_clips(tmp_path, 32, count, labelled=False, seed=3)[0, index][0])
    batches = list(data.evaluation_batches(whole, 1))
    assert [batch.images.shape for batch in batches] == [(1, 3, count, 32, 32) for count in (20, 7, 11)]
    random = clips.open_clips(tmp_path, 32, None, train=True, labelled=False)
    assert {int(random[epoch, 2][0][1, 0, 0, 0]) for epoch in range(60)} == set(range(9))
    with pytest.raises(UserError, match="^moving glyphs never end: give a number of frames, or a folder of videos$"):
        clips.open_clips("moving-glyphs", 32, frames=None)


@pytest.mark.parametrize("name, codec", [("v.avi", "libx264"), ("v.mkv", "mpeg4")])
def test_all_frames_of_a_video(tmp_path, name, codec):
    path = save_video(tmp_path / name, moving(30), codec)
    clip, _ = clips.open_clips(tmp_path, 64, frames=None, labelled=False)[0, 0]
    assert np.array_equal(frames_of(clip), decoded(path))
    content = path.read_bytes()
    begin = content.index(b"movi" if path.suffix == ".avi" else b"\x1f\x43\xb6\x75")
    path.write_bytes(content[: begin + 150])  # within the first frame
    assert reason(tmp_path, frames=None) == f"{name}: it has no frames"


# --- Folders ----------------------------------------------------------------------------------------------------------
def animate(path, frames, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others, **options)


def names_in(source, **options):
    dataset = clips.open_clips(source, 16, frames=5, **options)
    return dataset.classes, [(dataset.name(i), label) for i, label in enumerate(dataset.labels.tolist())]


def test_what_is_a_clip(tmp_path):
    save_video(tmp_path / "b" / "deep" / "v.MP4", moving(6))
    places(tmp_path / "b" / "frames", 16, 16)
    animate(tmp_path / "a" / "x.gif", moving(6))
    animate(tmp_path / "a" / "y.png", moving(6))
    save_video(tmp_path / "a" / "w.avi", moving(6))
    places(tmp_path / "a" / ".hidden", 16, 16)
    (tmp_path / "b" / "deep" / "v.jpg").write_bytes(b"a thumbnail beside a video is no clip")
    (tmp_path / "a" / "notes.txt").write_text("")
    by_class = [("a/w.avi", 0), ("a/x.gif", 0), ("a/y.png", 0), ("b/deep/v.MP4", 1), ("b/frames", 1)]
    assert names_in(tmp_path) == names_in(tmp_path, labelled=None) == (["a", "b"], by_class)
    assert names_in(tmp_path, labelled=False) == (["all"], [(name, 0) for name, _ in by_class])
    places(tmp_path / "loose", 16, 16)
    assert names_in(tmp_path) == names_in(tmp_path, labelled=None) == (["a", "b"], by_class)
    assert names_in(tmp_path / "loose", labelled=False) == (["all"], [(".", 0)])


def test_what_is_wrong_with_a_folder_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no picture folder"):
        clips.open_clips(tmp_path / "none", 16)
    with pytest.raises(UserError, match=r"holds no videos \(.avi .* folders of frames"):
        clips.open_clips(tmp_path, 16)
    places(tmp_path / "clip", 16, 16)
    with pytest.raises(UserError, match="has no class folders, its 1 videos lie directly in it"):
        clips.open_clips(tmp_path, 16)
    assert reason(tmp_path) == "clip: it has 9 frames, fewer than 17"
    (tmp_path / "clip" / "v.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="not installed: pip install av$"):
        clips.open_clips(tmp_path, 16, labelled=False)


def test_batches_name_and_skip_what_cannot_be_read(tmp_path, capsys):
    for i in range(6):
        save_video(tmp_path / f"{i}.mkv", moving(9 if i in (1, 4) else 20, seed=i), "ffv1")
    dataset = clips.open_clips(tmp_path, 32, train=True, labelled=False)
    (steps, others) = (
        [batch for step in data.training_batches(dataset, 0, 4, 2, 0, 1, 0, 3, workers) for batch in step]
        for workers in (0, 2)
    )
    for batch, other in zip(steps, others, strict=True):
        assert batch.images.shape == (2, 3, 17, 32, 32) and torch.equal(batch.images, other.images)
    assert {index for batch in steps for index in batch.unreadable} == {1, 4}
    (batch,) = data.evaluation_batches(dataset, 8)
    assert batch.indices.tolist() == [0, 2, 3, 5]
    bad = data.BadPictures(dataset)
    bad.add(batch.unreadable)
    assert "skipped: 1.mkv (it has 9 frames, fewer than 17)\n" in capsys.readouterr().err


# --- Animated pictures ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending, options", [("png", {}), ("webp", {"lossless": True}), ("gif", {})])
def test_animated_pictures(tmp_path, ending, options):
    frames = moving(12)
    if ending == "gif":  # 64 colours a frame
        frames = np.stack([np.asarray(Image.fromarray(frame).quantize(64).convert("RGB")) for frame in frames])
    animate(tmp_path / f"a.{ending}", frames, **options)
    dataset = clips.open_clips(tmp_path, 64, 5, train=True, labelled=False)
    found = [frames_of(dataset[epoch, 0][0]) for epoch in range(60)]
    firsts = [next(i for i in range(8) if np.array_equal(frames[i : i + 5], clip)) for clip in found]
    assert set(firsts) == set(range(8))


def test_still_and_damaged_pictures(tmp_path):
    animate(tmp_path / "a.gif", moving(20))
    content = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(content[: len(content) // 2])
    assert reason(tmp_path).startswith("a.gif: ")
    places(tmp_path / "b", 64, 64, 20)
    (tmp_path / "a.gif").unlink()
    Image.new("RGB", (64, 80)).save(tmp_path / "b" / "010.png")
    assert reason(tmp_path) == "b: its frames are of different shapes"
    (tmp_path / "b" / "010.png").write_bytes(b"")
    assert "it is not a picture" in reason(tmp_path)


# --- Videos -----------------------------------------------------------------------------------------------------------
VIDEOS = {
    "mpeg4.avi": {},
    "mpeg4 with frames that refer to later ones.avi": {"bf": "2"},
    "h264.mp4": {"codec": "libx264"},
    "sound.mov": {"codec": "libx264", "sound": True},
    "open groups.mkv": {"codec": "libx264", "x264-params": "open-gop=1:bframes=3:keyint=12"},
    "key frames only now and then whole.mkv": {"codec": "libx264", "x264-params": "intra-refresh=1:keyint=12"},
    "wrong times.avi": {"codec": "libx264", "x264-params": "bframes=3:keyint=12"},
    "one group.mp4": {"codec": "mpeg4", "gop": 500},
    "vp8.webm": {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "vp9.webm": {"codec": "libvpx-vp9", "cpu-used": "8"},
    "10 bits.mkv": {"codec": "libx265", "pixels": "yuv420p10le", "x265-params": "log-level=none:keyint=12"},
    "lossless.mkv": {"codec": "ffv1", "pixels": "bgr0"},
    "uneven times.mkv": {"codec": "libx264", "times": [0, 7, 9, 200, *range(300, 1700, 50)]},
    "uneven times.mp4": {"codec": "libx264", "times": [500, 507, 509, 700, *range(1300, 2700, 50)]},
}


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_of_decoding_from_the_start(tmp_path, name):
    options = VIDEOS[name]
    av = pytest.importorskip("av")
    if options.get("codec", "mpeg4") not in av.codecs_available:
        pytest.skip("no such encoder here")
    shown = moving(32)
    path = save_video(tmp_path / name, shown, **options)
    whole = decoded(path)
    assert len(whole) == 32 and np.abs(whole.astype(int) - shown).mean() < 40  # in order
    for first in range(0, 28, 3):
        frames = list(clips._read_frames(path, lambda count: range(first, first + 5 * (count == 32))))  # noqa: B023
        assert np.array_equal(frames, whole[first : first + 5]), first
    dataset = clips.open_clips(tmp_path, 64, train=False, labelled=False)
    assert np.array_equal(frames_of(dataset[0, 0][0]), whole[8 : 8 + 17])


def test_only_frames_from_a_key_frame_on_are_decoded(tmp_path, monkeypatch):
    path = save_video(tmp_path / "v.mp4", moving(60), "libx264")
    count, decode = [], clips._decoded

    def counting(*arguments):
        for frame in decode(*arguments):
            count.append(frame.pts)
            yield frame

    monkeypatch.setattr(clips, "_decoded", counting)
    assert len(list(clips._read_frames(path, lambda count: range(40, 45)))) == 5
    assert len(count) == 45 - 36  # key frames are 0, 12, 24, 36, 48


def test_what_cannot_be_read_of_videos_is_said(tmp_path):
    def said(name, content=None):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        words = reason(tmp_path)
        path.unlink()
        return words

    whole = save_video(tmp_path / "v.mp4", moving(40)).read_bytes()
    no_video = "it is none of avi,matroska,mov, or its index is cut off: "
    for content in whole[: len(whole) // 2], b"", b"text\n" * 99, b"ffconcat version 1.0\nfile '/etc/passwd'\n":
        assert said("v.mp4", content).startswith(f"v.mp4: {no_video}")
    animate(tmp_path / "v.gif", moving(20))
    (tmp_path / "v.gif").rename(tmp_path / "v.mp4")
    assert said("v.mp4").startswith(f"v.mp4: {no_video}")
    save_video(tmp_path / "v.mkv", moving(16))
    assert said("v.mkv") == "v.mkv: it has 16 frames, fewer than 17"
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mp4"), "w") as video:
        sound = video.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.rate = 8000
        video.mux(sound.encode(silence))
        video.mux(sound.encode())
    assert said("v.mp4") == "v.mp4: it has no video stream that PyAV decodes"


@pytest.mark.parametrize(
    "name, codec",
    [("v.avi", "mpeg4"), ("v.mkv", "mpeg4"), ("v.webm", "libvpx"), ("v.mov", "mjpeg"), ("v.mov", "libx264")],
)
def test_what_is_left_of_a_video_that_is_cut_off_is_read(tmp_path, name, codec):
    path = save_video(tmp_path / name, moving(40), codec, "yuvj420p" if codec == "mjpeg" else "yuv420p")
    whole, content = decoded(path), path.read_bytes()
    counts = []
    for share in np.linspace(0.7, 0.9, 7):
        path.write_bytes(content[: int(share * len(content))])
        clip = list(clips._read_frames(path, lambda count: counts.append(count) or range(count - 3, count)))
        shown = [next(i for i in range(40) if np.array_equal(frame, whole[i])) for frame in clip]
        if codec == "libx264":  # stores some frames after later ones: among the last, some are not there
            assert shown == sorted(shown) and counts[-1] - 1 <= shown[-1]
        else:
            assert shown == list(range(counts[-1] - 3, counts[-1]))
    assert len(counts) == 7 and len(set(counts)) > 3 and max(counts) < 40  # asked once each: no second way
    path.write_bytes(content[: int(0.2 * len(content))])
    assert name in reason(tmp_path)


def test_a_damaged_frame_is_not_shown(tmp_path):
    path = save_video(tmp_path / "v.mp4", moving(40), "libx264", **{"x264-params": "bframes=0"})
    with pytest.importorskip("av").open(str(path)) as video:
        packet = list(video.demux(video=0))[20]
        middle, end = packet.pos + packet.size // 2, packet.pos + packet.size
    content = bytearray(path.read_bytes())
    content[middle:end] = bytes(end - middle)
    path.write_bytes(content)
    assert reason(tmp_path) == "v.mp4: a frame of it is damaged"


def test_frames_before_a_cut_do_not_count(tmp_path):
    """A cut without coding anew leaves frames that a player decodes and does not show."""
    path = save_video(tmp_path / "v.mp4", moving(40), "libx264")
    whole, content = decoded(path), bytearray(path.read_bytes())
    place = content.index(b"elst") + 16  # the time that the first edit begins at
    (begin,) = struct.unpack(">i", content[place : place + 4])
    content[place : place + 4] = struct.pack(">i", begin + 5 * 512)  # 12,800 a second
    path.write_bytes(content)
    assert np.array_equal(decoded(path), whole[5:])
    for first in 0, 18, 30:
        counts = []
        frames = list(clips._read_frames(path, lambda count: counts.append(count) or range(first, first + 5)))  # noqa: B023
        assert counts == [35] and np.array_equal(frames, whole[5:][first : first + 5])  # asked once: no second way


def test_a_rotation_is_not_applied(tmp_path):
    path = save_video(tmp_path / "v.mp4", moving(20))
    upright, content = decoded(path), bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    with pytest.importorskip("av").open(str(path)) as video:
        assert next(video.decode(video=0)).rotation in (90, -90)
    clip, _ = clips.open_clips(tmp_path, 64, labelled=False)[0, 0]
    assert np.array_equal(frames_of(clip), upright[2 : 2 + 17])


@pytest.mark.parametrize("second, readable", [((32, 32), True), ((64, 48), False)])
def test_a_video_that_changes_size(tmp_path, second, readable):
    """A clip may, as long as its frames, resized, are alike."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mkv"), "w") as video:
        stream = video.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuvj420p"
        number = 0
        for height, width in (64, 64), second:
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.height, encoder.width, encoder.pix_fmt = height, width, "yuvj420p"
            encoder.time_base = Fraction(1, 25)
            for frame in moving(10, height, width):
                for packet in encoder.encode(av.VideoFrame.from_ndarray(frame, "rgb24")):
                    packet.stream, packet.time_base = stream, Fraction(1, 25)
                    packet.pts = packet.dts = number
                    number += 1
                    video.mux(packet)
    if readable:
        clip, _ = clips.open_clips(tmp_path, 64, labelled=False)[0, 0]
        assert clip.shape == (3, 17, 64, 64)
    else:
        assert reason(tmp_path) == "v.mkv: its frames are of different shapes"


# --- Writing ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending, codec", [("webp", ""), ("gif", ""), ("mp4", "libx264"), ("mp4", "mpeg4")])
def test_written_videos_are_read_as_they_were(tmp_path, monkeypatch, ending, codec):
    if ending == "mp4":  # which has colours at half the resolution: soft ones
        monkeypatch.setattr(pytest.importorskip("av"), "codecs_available", {codec})
        rows, columns = np.mgrid[:48, :64]
        waves = [[np.sin((rows + 2 * columns) / 40 + i / 3 + c) for c in range(3)] for i in range(12)]
        frames = np.uint8(128 + 100 * np.moveaxis(waves, 1, -1))
    else:
        frames = moving(12, 47, 63)
    if ending == "gif":
        frames = np.stack([np.asarray(Image.fromarray(frame).quantize(64).convert("RGB")) for frame in frames])
    (path := tmp_path / f"v.{ending.upper()}").symlink_to(tmp_path / "victim")
    clips.write_video(path, torch.from_numpy(frames).permute(3, 0, 1, 2), fps=20)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and not path.is_symlink()
    found = np.stack(list(clips._read_frames(path))).astype(float)
    assert found.shape == frames.shape
    if ending != "mp4":
        assert np.array_equal(found, frames)
        with Image.open(path) as picture:
            picture.seek(1)
            picture.load()
            assert picture.info["duration"] == 50 and picture.info["loop"] == 0
    else:
        distances = np.square(found[:, None] - frames).mean((2, 3, 4)) ** 0.5  # of each to each
        assert (distances.argmin(1) == range(12)).all()
        # H.264's steps double every 6 quantizers: at 17, 4.5. So far at most, if all latents were rounded to zero.
        assert distances.diagonal().max() < 4.5
        with pytest.importorskip("av").open(str(path)) as video:
            stream = video.streams.video[0]
            assert stream.average_rate == 20 and stream.pix_fmt == "yuv420p"  # which every player shows


def test_what_is_wrong_with_a_video_to_write_is_said(tmp_path, monkeypatch):
    def said(name, height=64):
        (tmp_path / name).write_bytes(b"old")
        with pytest.raises(UserError) as error:
            clips.write_video(tmp_path / name, torch.zeros(3, 5, height, 64, dtype=torch.uint8))
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"old")]
        (tmp_path / name).unlink()
        return str(error.value).replace(f"{tmp_path}/", "")

    assert said("v.avi") == "v.avi ends in none of .webp, .gif, .mp4, the videos that are written"
    assert said("webp").startswith("webp ends in none")
    pytest.importorskip("av")
    assert said("v.mp4", 63) == "v.mp4 cannot be 64x63: .mp4 takes even sides only, .webp any"
    monkeypatch.setitem(sys.modules, "av", None)
    assert said("v.mp4").endswith("not installed: pip install av")


# --- Moving glyphs ----------------------------------------------------------------------------------------------------
def test_moving_glyphs_are_a_function_of_seed_stream_and_number():
    a, b = (clips.open_clips("moving-glyphs:50:ABC", 32, 5, train=True, seed=4) for _ in range(2))
    assert len(a) == 50 and a.classes == ["A", "B", "C"] and a.shape == (5, 32, 32)
    for i in (0, 7, 49):
        clip, label = a[0, i]
        assert clip.dtype == torch.uint8 and clip.shape == (3, 5, 32, 32) and label == a.labels[i] == i % 3
        assert torch.equal(clip, b[9, i][0])
    others = [
        clips.open_clips("moving-glyphs:50:ABC", 32, 5, train=False, seed=4)[0, 7][0],
        clips.open_clips("moving-glyphs:50:ABC", 32, 5, train=True, seed=5)[0, 7][0],
        a[0, 10][0],
    ]
    for other in others:
        assert (other.int() - a[0, 7][0].int()).abs().float().mean() > 5
    assert len(clips.open_clips("moving-glyphs", 16)) == 50_000
    with pytest.raises(UserError, match="is not moving-glyphs:COUNT:CLASSES, for instance moving-glyphs:4000"):
        clips.open_clips("moving-glyphs:0", 16)


def test_moving_glyphs_of_another_length_and_size():
    short, long, large = (clips.open_clips("moving-glyphs", s, t, train=True) for s, t in [(32, 5), (32, 40), (128, 5)])
    for i in range(10):
        assert torch.equal(long[0, i][0][:, :5], short[0, i][0])
        shrunk = large[0, i][0].float().unflatten(2, (32, 4)).unflatten(4, (32, 4)).mean((3, 5))
        assert (shrunk - short[0, i][0].float()).abs().mean() < 10  # two different clips: 60 and more


def test_letters_move_and_stay_inside():
    dataset = clips.open_clips("moving-glyphs", 64, 50, train=True)
    for i in range(36):
        red, green, blue = dataset[0, i][0].double() / 255
        luma = 0.299 * red + 0.587 * green + 0.114 * blue  # (T, S, S); letter and ground are beside 0.475
        light = luma > 0.475
        letter = light != (light[:, 0].double().mean() > 0.5)
        area = letter.sum((1, 2)).double()
        assert area.min() > 0.8 * area.mean() > 50, i  # never partly outside
        ring = torch.cat([letter[:, 0], letter[:, -1], letter[:, :, 0], letter[:, :, -1]], 1)
        assert ring.sum(1).max() <= 2
        rows, columns = torch.arange(64.0), torch.arange(64.0)
        middle = torch.stack([(letter.sum(2) * rows).sum(1), (letter.sum(1) * columns).sum(1)]) / area
        steps = middle.diff(dim=1)
        assert 0.3 < steps.norm(dim=0).mean() < 3 and steps.abs().max() < 4  # pixels a frame; none jumps


def test_a_letter_is_followed_exactly_where_one_of_its_poses_moves_over_a_plain_ground():
    shifts = [(0, 0), (7, 0), (0, -7), (-5, 3), (6, 8)]  # to the right and down
    masks = {letter: np.asarray(clips._upright(letter, 32, 0.28).reduce(2)) / 255.0 for letter in "BC"}
    masks = [np.roll(masks[letter], (down, right), (0, 1)) for letter, (right, down) in zip("CBBBB", shifts)]
    for ground, colour in (((240, 30, 90), (20, 200, 95)), ((60, 60, 60), (50, 50, 50))):
        clip = np.uint8(np.array(ground) + np.stack(masks)[..., None] * np.subtract(colour, ground) + 0.5)
        numbers, found = clips.follow_letters(np.stack([clip[:3], clip[2:]]), "ABC")
        assert numbers.tolist() == [1, 1] and found.shape == (2, 3, 2)  # also where the first of three frames shows C
        assert found[0, 1:].tolist() == [[16 + x, 16 + y] for x, y in shifts[1:3]]
        assert found[1].tolist() == [[16 + x, 16 + y] for x, y in shifts[2:]]
        # Half beyond the border, and back on the other side: no letter flies there.
        _, found = clips.follow_letters(np.roll(clip, 16, 2)[None], "ABC")
        assert abs(found - 16).max() <= (0.5 - 0.24) * 32 + 1


def test_moving_glyphs_are_followed(monkeypatch):
    """Each letter is the right one; its places are where it was put: rotate's `translate`, in half pixels."""
    flights, rotate = [], Image.Image.rotate

    def watched(self, *args, **options):
        flights.extend([options["translate"]] if "translate" in options else [])
        return rotate(self, *args, **options)

    monkeypatch.setattr(Image.Image, "rotate", watched)
    dataset = clips.open_clips("moving-glyphs:20:ABCDEFGH", 32, 6, train=True)
    made = np.stack([frames_of(dataset[0, i][0]) for i in range(20)])
    numbers, found = clips.follow_letters(made, dataset.classes)
    assert numbers.tolist() == dataset.labels.tolist()
    distances = np.linalg.norm(found - (16 + np.reshape(flights, (20, 6, 2)) / 2), axis=-1)
    assert distances.max() < 1.5
