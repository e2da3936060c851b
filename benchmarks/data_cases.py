"""What benchmarks/data.py measures, each in a process of its own: read lines "side images", write the seconds it took.

Both pipelines read, decode, crop, tokenise (with the same vocabulary) and batch the same files. open_clip's does what
its `get_wds_dataset` and `image_transform` do (mlfoundations/open_clip, src/open_clip_train/data.py and
src/open_clip/transform.py) with the real webdataset package and Pillow:

    RandomResizedCrop(image_size, scale=(0.9, 1.0), interpolation=InterpolationMode.BICUBIC), MaybeConvertMode(),
    MaybeToTensor(), normalize

torchvision's operations on a Pillow image are Pillow's; PyTorch's on the result are done by NumPy, as many, in the same
order.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from benchmarks.data_photos import TOKENIZER

SIZE, LENGTH, BATCH = 288, 64, 16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, open_clip's default
LOCATIONS = {"array_record": "{}.array_record", "webdataset": "{}.tar", "parquet": "{}.parquet", "folder": "{}"}


class Repeated:
    """A source over and over, as if it were large.

    Grain's shuffle is slow on few records (0.3 ms each of 100, 0.004 ms from 50,000 on), and nobody trains on so few.
    """

    tokenizer_path = None
    attribution = ""
    class_names: Mapping[str, Sequence[str]] | None = None

    def __init__(self, source: Any, times: int = 1000):
        self.name = f"{source!r} {times} times"
        self._source, self._times = source, times

    def __len__(self) -> int:
        return len(self._source) * self._times

    def __getitem__(self, index: SupportsIndex) -> Any:
        return self._source[index.__index__() % len(self._source)]

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def contents(self) -> Mapping[str, str]:
        return self._source.contents()


def ours(folder: pathlib.Path, side: int, options: dict[str, Any]) -> Iterator[Any]:
    """Batches of coca_jax."""
    import grain

    from coca_jax import config
    from coca_jax.data import images, pipeline
    from coca_jax.data.sources import open_source
    from coca_jax.data.tokenizer import Tokenizer

    kind = options["source"]
    data = config.Data(
        crop_area=tuple(options["crop"]),
        threads=options.get("threads", 1),
        workers=options.get("workers", 0),
        **options.get("augment", {}),
    )
    loader = pipeline.train_loader(
        Repeated(open_source(f"{kind}:{folder / LOCATIONS[kind].format(side)}")),
        Tokenizer(folder / TOKENIZER),
        data,
        image_size=SIZE,
        length=LENGTH,
        batch_size=BATCH,
        seed=0,
    )
    if options.get("normalize"):
        loader = loader.map(lambda batch: batch | {"images": images.normalize(batch["images"], MEAN, STD)})
    if options.get("prefetch"):
        loader = grain.experimental.ThreadPrefetchIterDataset(loader, prefetch_buffer_size=options["prefetch"])
    return iter(loader)


def random_resized_crop(
    size: int, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Callable[[Any], Any]:
    """torchvision.transforms.RandomResizedCrop with InterpolationMode.BICUBIC, on Pillow images."""
    import PIL.Image

    def apply(image: PIL.Image.Image) -> PIL.Image.Image:
        width, height = image.size
        for _ in range(10):
            area = width * height * random.uniform(*scale)
            aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                break
        else:
            w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
            left, top = (width - w) // 2, (height - h) // 2
        box = (left, top, left + w, top + h)
        return image.crop(box).resize((size, size), PIL.Image.Resampling.BICUBIC)  # Pillow's resize is antialiased

    return apply


def open_clip(folder: pathlib.Path, side: int, options: dict[str, Any]) -> Iterator[Any]:
    """Batches of open_clip's pipeline."""
    import webdataset as wds

    from coca_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder / TOKENIZER)
    crop = random_resized_crop(SIZE, tuple(options["crop"]))
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))

    def preprocess(image: Any) -> np.ndarray:
        pixels = np.array(crop(image).convert("RGB"))
        # ToTensor: to [3, h, w], a copy of its own, float, a division; Normalize: a clone, and in place from there.
        tensor = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32) / np.float32(255)
        tensor = tensor.copy()
        tensor -= mean
        tensor /= std
        return tensor

    pipeline = wds.DataPipeline(
        wds.ResampledShards(str(folder / f"{side}.tar")),  # without end, as with open_clip's --dataset-resampled
        wds.tarfile_to_samples(),
        wds.shuffle(500, initial=100),
        wds.select(lambda sample: "txt" in sample and "jpg" in sample),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=preprocess, text=lambda text: tokenizer.encode(text, LENGTH)),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    )
    return iter(pipeline)


def stages(folder: pathlib.Path, side: int, images_wanted: int) -> dict[str, float]:
    """CPU milliseconds an image of each stage of our path, one after the other in one thread."""
    from coca_jax import config
    from coca_jax.data import images
    from coca_jax.data.images import augmentation, decoding, geometry
    from coca_jax.data.sources import open_source
    from coca_jax.data.tokenizer import Tokenizer

    source = open_source(f"array_record:{folder / f'{side}.array_record'}")
    tokenizer, data = Tokenizer(folder / TOKENIZER), config.Data()
    spent = dict.fromkeys(
        ("read", "header and draw", "decode", "crop and resize", "tokenise", "batch", "host norm."), 0
    )
    rng, squares = np.random.default_rng(0), []
    order = rng.integers(len(source), size=images_wanted).tolist()
    for number in order:
        clock = [time.thread_time_ns()]

        def lap(stage: str, clock: list[int] = clock) -> None:
            clock.append(time.thread_time_ns())
            spent[stage] += clock[-1] - clock[-2]

        record = source[number]
        lap("read")
        picture = decoding.Encoded(record.image)
        box = augmentation._crop_box(picture.width, picture.height, np.random.default_rng(number), data)
        region = geometry.align(box, picture.width, picture.height, SIZE)
        lap("header and draw")
        pixels, reduced = picture.pixels(data.background, region.factor)
        lap("decode")
        squares.append(geometry.resize(geometry.cut(pixels, region, reduced), SIZE, SIZE))
        lap("crop and resize")
        tokenizer.encode(record.captions[0], LENGTH)
        lap("tokenise")
        if len(squares) == BATCH:
            batch = np.stack(squares)
            lap("batch")
            images.normalize(batch, MEAN, STD)
            lap("host norm.")
            squares = []
    return {stage: value / len(order) / 1e6 for stage, value in spent.items()}


# A process of its own, in an interpreter that has TensorFlow; nothing here imports it. Without tokenising, which
# TensorFlow proper has none of: that is to its advantage.
TF_DATA = """
import os, sys, json, time, tarfile, pathlib
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
import tensorflow as tf
folder, size, batch, crop = json.loads(sys.argv[1])
mean, std = tf.constant({mean}), tf.constant({std})

def write(side):
    path = os.path.join(folder, f"{{side}}.tfrecord")
    if not os.path.exists(path):
        with tarfile.open(os.path.join(folder, f"{{side}}.tar")) as tar, tf.io.TFRecordWriter(path) as out:
            for member in tar:
                if member.name.endswith(".jpg"):
                    value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[tar.extractfile(member).read()]))
                    features = tf.train.Features(feature={{"jpg": value}})
                    out.write(tf.train.Example(features=features).SerializeToString())
    return path

def example(serialized):
    jpg = tf.io.parse_single_example(serialized, {{"jpg": tf.io.FixedLenFeature([], tf.string)}})["jpg"]
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(jpg), tf.zeros([0, 0, 4]), area_range=crop, aspect_ratio_range=(3 / 4, 4 / 3),
        use_image_if_no_bounding_boxes=True)
    y, x, _ = tf.unstack(begin); h, w, _ = tf.unstack(extent)
    image = tf.io.decode_and_crop_jpeg(jpg, tf.stack([y, x, h, w]), channels=3)
    image = tf.image.resize(image, (size, size), method="bicubic", antialias=True)
    return (tf.clip_by_value(image, 0, 255) / 255 - mean) / std

def batches(side):
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    data = tf.data.TFRecordDataset(write(side)).repeat().shuffle(100).map(example, num_parallel_calls=1).batch(batch)
    return iter(data.with_options(options))

made = {{}}
print("ready", flush=True)
for line in sys.stdin:
    side, count = map(int, line.split())
    if side not in made:
        made[side] = batches(side)
        for _ in range(2):
            next(made[side])
    next(made[side])
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count // batch):
        next(made[side])
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)
"""


def tf_program() -> str:
    return TF_DATA.format(mean=list(MEAN), std=list(STD))


def serve(case: dict[str, Any]) -> None:
    """Answers requests on standard input until it ends."""
    if case["cores"] is not None:
        os.sched_setaffinity(0, case["cores"])
    folder = pathlib.Path(case["folder"])
    make = functools.cache(lambda side: (ours if case["pipeline"] == "ours" else open_clip)(folder, side, case))
    print("ready", flush=True)
    for line in sys.stdin:
        side, count = map(int, line.split())
        if case["pipeline"] == "stages":
            print(json.dumps(stages(folder, side, count)), flush=True)
            continue
        batches = make(side)
        for _ in range(2 * case.get("threads", 1) + 4 * case.get("workers", 0) + case.get("prefetch", 0)):
            next(batches)  # what was made ahead in the pause is not counted
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count // BATCH):
            next(batches)
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)
