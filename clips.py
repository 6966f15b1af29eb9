"""Clips for the video tokenizer: folders of videos, animated pictures and frames, and built-in moving letters.

    clips = open_clips("ucf101/train", size=128, frames=17, train=True)     # needs PyAV: pip install av
    clips = open_clips("moving-glyphs:4000:ABCDEFGH", size=32, train=True)
    for micro_batches in data.training_batches(clips, seed=0, ...):         # images are uint8 (b, 3, T, S, S)

As published: consecutive frames at a video's own rate, shrunk as OpenCV does, one random crop for all of them.

Letters: T frames, S side in pixels, H W pixels of a video's frame."""

import collections
import contextlib
import itertools
import os

import numpy as np
import torch
from PIL import Image

import glyphs
from data import ENDINGS, PictureFolder, load_rgb, opened, plain_file, to_picture, walk
from runtime import UserError, reason_of, replacing

VIDEOS, ANIMATIONS = (".avi", ".mkv", ".mov", ".mp4", ".webm"), (".gif", ".png", ".webp")  # in capitals too
CONTAINERS = "avi,matroska,mov"  # FFmpeg goes by content, and would follow a playlist elsewhere: it may open these only
CLIP, MOVING_GLYPH = 4, 5  # random streams; see data.py


def open_clips(source, size, frames=17, train=False, seed=0, labelled=True, first=False):
    """Clips of `frames` consecutive frames of `size` x `size` pixels, as a map-style dataset; None: whole videos.

    source: built-in `moving-glyphs[:COUNT[:CLASSES]]`, or a folder with one folder a class, with these at any depth:
    videos, by their names (VIDEOS); animated pictures (ANIMATIONS), if the first such picture in a folder is animated;
    folders that hold still pictures and none of these, which are a video's frames, sorted by name.
    train: frames from a random one on, with a random crop, functions of (seed, epoch, index). Otherwise the frames in
    the middle, or the `first`; the crop is random too, as published, but a function of (seed, index). moving-glyphs:
    other clips.
    labelled: as in `data.open_pictures`, which tells what is returned; but `.shape` is (T, S, S), of whole videos None,
    and `dataset[epoch, index]` is (uint8 tensor (3, T, S, S), label), and raises whatever PyAV and Pillow raise, and
    ValueError for too few frames. What is left of a cut-off file is read. As published, rotations are not applied."""
    assert size > 0 and (frames is None or frames > 0) and seed >= 0
    if str(source).split(":")[0] == "moving-glyphs":
        return MovingGlyphs(str(source), size, frames, train, seed)
    return ClipFolder(source, size, frames, train, seed, labelled, first)


class ClipFolder(PictureFolder):
    """See `open_clips`."""

    kind, endings = "videos", " ".join([*VIDEOS, "animated", *ANIMATIONS, "or folders of frames"])

    def __init__(self, source, size, frames, train, seed, labelled, first=False):
        self.frames, self.first = frames, first
        super().__init__(source, size, train, seed, labelled)
        self.shape = frames and (frames, size, size)

    def _by_class(self):
        found = {}
        for folder, files in walk(self.source):
            videos = [name for name in files if name.lower().endswith(VIDEOS)]
            videos += _animations(self.source / folder, files)
            paths = [os.path.normpath(f"{folder}/{name}") for name in videos]
            if not videos and any(name.lower().endswith(ENDINGS) for name in files):
                paths, folder = [folder], os.path.dirname(folder) or "."
            found.setdefault(folder.split("/")[0], []).extend(paths)
        return found

    def __getitem__(self, entry):
        epoch, index = entry
        rng = np.random.default_rng([CLIP, self.seed, epoch if self.train else 0, index])

        def chosen(count):  # numbers of the clip's frames, of the `count` that there are
            if count < self.frames:
                raise ValueError(f"it has {count} frames, fewer than {self.frames}")
            middle = 0 if self.first else count // 2 - self.frames // 2
            first = rng.integers(count - self.frames + 1) if self.train else middle
            return range(first, first + self.frames)

        frames = _read_frames(self.source / self.name(index), chosen if self.frames else range)
        clip = [resize_frame(frame, self.size) for frame in frames]
        if len({frame.shape for frame in clip}) != 1:
            raise ValueError("its frames are of different shapes" if clip else "it has no frames")
        left, top = (rng.integers(pixels - self.size + 1) for pixels in clip[0].shape[1::-1])
        clip = np.stack(clip)[:, top : top + self.size, left : left + self.size]  # (T, S, S, 3)
        return torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2))), int(self.labels[index])


def resize_frame(frame, short_side):
    """uint8 (H, W, 3), its short side scaled to `short_side`, the long one rounded down: to the last bit as OpenCV's
    INTER_LINEAR does it, without smoothing first, by weights of 11 bits, columns before rows. Enlarges too."""
    height, width = (int(short_side * pixels / min(frame.shape[:2])) for pixels in frame.shape[:2])
    (left, right), (left_weight, right_weight) = _neighbours(frame.shape[1], width)
    levels = frame.astype(np.int32)
    levels = levels[:, left] * left_weight + levels[:, right] * right_weight >> 4  # (H, width, 3)
    (upper, lower), (upper_weight, lower_weight) = _neighbours(frame.shape[0], height)
    upper_part, lower_part = levels[upper] * upper_weight[:, None], levels[lower] * lower_weight[:, None]
    return ((upper_part >> 16) + (lower_part >> 16) + 2 >> 2).astype(np.uint8)


def _neighbours(count, new_count):
    """For `new_count` places spread over `count` pixels: the two pixels beside each place, (2, new_count), the same one
    twice beyond the border; and their weights, (2, new_count, 1), which add up to 2048."""
    places = ((np.arange(new_count) + 0.5) * (count / new_count) - 0.5).astype(np.float32)  # as OpenCV has them
    first = np.floor(places)
    weights = np.rint(2048 * np.stack([1 - (places - first), places - first]))
    return np.stack([first, first + 1]).clip(0, count - 1).astype(int), weights.astype(np.int32)[..., None]


# --- Frames of a file -------------------------------------------------------------------------------------------------
def _animations(folder, names):
    """The pictures of ANIMATIONS among `names`, if the first of them that can be read is animated."""
    pictures = sorted(name for name in names if name.lower().endswith(ANIMATIONS))
    for name in pictures:
        with contextlib.suppress(Exception), opened(folder / name) as picture:
            return pictures if getattr(picture, "is_animated", False) else []
    return []


def _read_frames(path, chosen=range):
    """Yields a video's frames, uint8 (H, W, 3): of all `count` of them those in the range chosen(count); else all."""
    if path.is_dir():
        names = sorted(name for name in os.listdir(path) if name[0] != "." and name.lower().endswith(ENDINGS))
        for number in chosen(len(names)):
            yield np.asarray(load_rgb(path / names[number]))
    elif path.name.lower().endswith(ANIMATIONS):
        with opened(path) as picture:
            for number in chosen(getattr(picture, "n_frames", 1)):
                picture.seek(number)
                yield np.asarray(picture.convert("RGB"))
    else:
        for frame in _decoded(path) if chosen is range else _video_frames(path, chosen):
            if frame.is_corrupt:
                raise ValueError("a frame of it is damaged")
            yield frame.to_ndarray(format="rgb24")


def _video_frames(path, chosen):
    """The same for a video file, as PyAV's frames. Reads the time stamps of all packets, but decodes only from the last
    key frame before the clip on. If other time stamps come out, as from some .avi, decodes from the start."""
    with _opened_video(path) as (video, stream):
        packets = (packet for packet in video.demux(stream) if packet.size and not packet.is_discard)
        stamps = [(packet.pts or 0, packet.is_keyframe) for packet in packets if not packet.is_corrupt]
    times, key_times = sorted(time for time, _ in stamps), [time for time, is_key in stamps if is_key]
    clip = chosen(len(times))
    key = max((time for time in key_times if time <= times[clip.start]), default=times[0])
    expected = [time for time in times[: clip.stop] if time >= key]
    frames, found, wanted = collections.deque(maxlen=len(clip)), [], set(expected)
    decoded = (frame for frame in _decoded(path, key) if frame.pts in wanted)
    for frame in itertools.islice(decoded, len(expected)):
        frames.append(frame)
        found.append(frame.pts)
    if found == expected:
        return frames
    clip = chosen(sum(1 for _ in _decoded(path)))
    return itertools.islice(_decoded(path), clip.start, clip.stop)


def _decoded(path, time=None):
    """Yields a video's frames in order, from the last key frame up to `time` on, or from the start."""
    with _opened_video(path) as (video, stream):
        if time is not None:
            video.seek(time, stream=stream)
        for packet in video.demux(stream):
            if not packet.is_corrupt:  # cut off by the end of the file
                yield from packet.decode()


@contextlib.contextmanager
def _opened_video(path):
    av = pyav()
    with plain_file(path) as file:
        try:
            video = av.open(file, container_options={"format_whitelist": CONTAINERS}, metadata_errors="replace")
        except (av.FFmpegError, OSError) as error:
            raise ValueError(f"it is none of {CONTAINERS}, or its index is cut off: {reason_of(error)}") from None
        with video:
            stream = video.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise ValueError("it has no video stream that PyAV decodes")
            stream.codec_context.thread_count = 1  # loaders have workers
            yield video, stream


def pyav():
    try:
        import av
    except ImportError:
        raise UserError("PyAV, which reads and writes videos, is not installed: pip install av") from None
    return av


def write_video(path, clip, fps=24):
    """Write uint8 (3, T, H, W) as what `path` ends in: an animated .webp (lossless) or .gif (256 colours), in both of
    which a frame equal to the one before it lengthens that one; or .mp4 (H.264), which needs PyAV and even sides."""
    ending, (height, width) = os.path.splitext(path)[1].lower(), clip.shape[2:]
    if ending not in (".webp", ".gif", ".mp4"):
        raise UserError(f"{path} ends in none of .webp, .gif, .mp4, the videos that are written")
    av = pyav() if ending == ".mp4" else None
    if av and (height % 2 or width % 2):
        raise UserError(f"{path} cannot be {width}x{height}: .mp4 takes even sides only, .webp any")
    frames = [to_picture(frame) for frame in clip.unbind(1)]
    with replacing(path) as file:
        if not av:
            options = {"duration": 1000 / fps, "loop": 0, "lossless": True}  # milliseconds, for ever
            return frames[0].save(file, ending[1:], save_all=True, append_images=frames[1:], **options)
        with av.open(file, "w", "mp4") as video:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"  # their quality: crf, and b
            stream = video.add_stream(codec, fps, {"crf": "17", "b": "8M"}, width=width, height=height)
            for frame in [*map(av.VideoFrame.from_image, frames), None]:  # None: the end
                video.mux(stream.encode(frame))


# --- Moving glyphs ----------------------------------------------------------------------------------------------------
class MovingGlyphs(glyphs.Glyphs):
    """`moving-glyphs[:COUNT[:CLASSES]]`: a letter that flies, bounces off the sides and swings by up to 30 degrees.
    Clip i has class i % classes and is a function of (seed, train, i): more `frames` only continue it."""

    def __init__(self, source, size, frames, train, seed):
        super().__init__(source, size, train, seed)
        if frames is None:
            raise UserError("moving glyphs never end: give a number of frames, or a folder of videos")
        self.kind, self.shape = "videos", (frames, size, size)

    def __getitem__(self, entry):  # lengths are in sides, times in frames
        frames, size, _ = self.shape
        letter = self.classes[self.labels[entry[1]]]
        rng = np.random.default_rng([MOVING_GLYPH, self.seed, int(self.train), entry[1]])
        ground, colour = glyphs.scene(size, rng)
        radius = rng.uniform(0.24, 0.32)  # of the circle in which the letter swings
        upright = _upright(letter, size, radius)
        times, direction, span = np.arange(frames), rng.uniform(0, 2 * np.pi), 1 - 2 * radius
        velocity = rng.uniform(0.01, 0.04) * np.array([np.cos(direction), np.sin(direction)])
        flown = rng.uniform(0, span, 2) + velocity * times[:, None]  # (T, 2): x, y
        shifts = 2 * size * (span / 2 - abs(flown % (2 * span) - span))  # to and fro
        angles = 30 * np.sin(2 * np.pi * (rng.random() + rng.uniform(0.01, 0.05) * times))
        turned = [upright.rotate(a, Image.Resampling.BILINEAR, translate=tuple(s)) for a, s in zip(angles, shifts)]
        masks = np.stack([np.asarray(mask.reduce(2)) / 255 for mask in turned])[..., None]  # (T, S, S, 1)
        clip = (255 * (ground + masks * (colour - ground)) + 0.5).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2))), int(self.labels[entry[1]])


def _upright(letter, size, radius):  # in the middle of a grey Pillow picture twice as large as a frame
    left, top, right, bottom = glyphs.letter_box(letter)
    return glyphs.upright_letter(letter, 2 * size, 4 * radius * size / np.hypot(right - left, bottom - top), size, size)


def follow_letters(clips, letters):
    """What uint8 clips (N, T, S, S, 3) of moving glyphs show: which of `letters`, as numbers (N,), and where its middle
    is, in pixels, (N, T, 2): x, y. It is the letter that, in some size, turn and place in each frame, and scaled for
    each colour, comes nearest to the frames less their means."""
    size, spectra, inside = clips.shape[2], [], []
    shift = (torch.arange(size) - size // 2).abs()  # of a letter from the middle
    for letter in letters:
        for radius in (0.24, 0.28, 0.32):
            upright, free = _upright(letter, size, radius), shift <= (0.5 - radius) * size + 1
            for angle in range(-30, 31, 10):
                mask = torch.from_numpy(np.asarray(upright.rotate(angle, Image.Resampling.BILINEAR).reduce(2)) / 255.0)
                mask = mask - mask.mean()
                spectra.append(torch.fft.rfft2(mask / mask.norm()).conj())
                inside.append(free[:, None] & free)
    spectra, inside = torch.stack(spectra)[:, None], torch.stack(inside)  # (poses, 1, S, S/2 + 1), (poses, S, S)
    numbers, places = [], []
    for clip in clips:
        best = []
        for frame in torch.from_numpy(clip).double().movedim(-1, 1):  # (3, S, S)
            # The frame's correlation with each pose at each place, by FFT
            explained = torch.fft.irfft2(torch.fft.rfft2(frame) * spectra, s=(size, size))  # (poses, 3, S, S)
            explained = torch.fft.fftshift(explained.square().sum(1), (1, 2))  # (poses, S, S), no shift in the middle
            best.append((explained * inside).view(len(letters), -1).max(1))  # of all poses and places of a letter
        number = sum(score for score, _ in best).argmax()
        place = torch.stack([where[number] % size**2 for _, where in best])  # (T,)
        places.append(torch.stack([place % size, place // size], 1))
        numbers.append(number)
    return torch.stack(numbers).numpy(), torch.stack(places).numpy()
