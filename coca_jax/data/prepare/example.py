"""tf.train.Example without TensorFlow: the message is described here and parsed by protobuf."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from coca_jax.data.records import BadExample
from coca_jax.data.sources.base import one_line


@functools.cache
def example_class() -> type[message.Message]:
    """tensorflow.Example (tensorflow/core/example/{example,feature}.proto), in a pool of its own."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="coca_jax/example.proto", package="tensorflow", syntax="proto3")
    for name, kind in (("BytesList", "BYTES"), ("FloatList", "FLOAT"), ("Int64List", "INT64")):
        values = file.message_type.add(name=name)
        values.field.add(name="value", number=1, label=field.LABEL_REPEATED, type=getattr(field, f"TYPE_{kind}"))
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes_list", "float_list", "int64_list"), 1):
        type_name = f".tensorflow.{file.message_type[number - 1].name}"
        feature.field.add(
            name=name, number=number, label=field.LABEL_OPTIONAL, type=field.TYPE_MESSAGE, type_name=type_name
        ).oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")  # what map<string, Feature> is short for
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING)
    messages = {"label": field.LABEL_OPTIONAL, "type": field.TYPE_MESSAGE}
    entry.field.add(name="value", number=2, type_name=".tensorflow.Feature", **messages)
    entries = {"label": field.LABEL_REPEATED, "type": field.TYPE_MESSAGE}
    features.field.add(name="feature", number=1, type_name=".tensorflow.Features.FeatureEntry", **entries)
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, type_name=".tensorflow.Features", **messages)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def features(data: bytes, where: str) -> Mapping[str, Any]:
    """The features of a serialised Example by name. Raises BadExample, with `where` in its message."""
    parsed: Any = example_class()()
    try:
        parsed.ParseFromString(data)
    except message.DecodeError as error:
        raise BadExample("unreadable", f"{where} is no tf.train.Example: {one_line(error)}") from error
    return parsed.features.feature
