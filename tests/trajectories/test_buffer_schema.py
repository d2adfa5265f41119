import json
from dataclasses import replace

import pytest

from lad_dist.errors import TrajectoryError
from lad_dist.trajectories.schema import META_KEY, BufferMeta, arrow_schema, parse_part_path, part_path


def test_metadata_survives_the_round_trip(meta):
    assert BufferMeta.from_metadata(meta.to_metadata()) == meta
    assert BufferMeta.from_metadata(arrow_schema(meta).metadata) == meta


def test_vector_lengths_count_the_parameters_of_the_stage(meta):
    assert meta.vector_length("representation") == 20 * 7 + 20 + 3 * 20 + 3
    assert meta.vector_length("classifier") == 3 * 20 + 3


def test_positions_are_named_by_their_parameter(meta):
    assert meta.parameter_at("representation", 139) == "features.weight"
    assert meta.parameter_at("representation", 140) == "features.bias"
    assert meta.parameter_at("classifier", 60) == "head.bias"
    with pytest.raises(IndexError):
        meta.parameter_at("classifier", 63)


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": (("a", (2,)), ("a", (3,))), "classifier_parameters": ()},
        {"classifier_parameters": ("head.bias", "head.weight")},  # not in module order
        {"classifier_parameters": ("nose",)},
        {"parameters": (("a", (0,)),), "classifier_parameters": ()},
        {"parameters": (("a", (2**30,)),), "classifier_parameters": ()},
    ],
)
def test_contradicting_metadata_is_refused(meta, change):
    with pytest.raises(TrajectoryError, match="trajectory metadata"):
        replace(meta, **change)


def test_a_recipe_that_is_not_json_is_refused(meta):
    with pytest.raises(TrajectoryError, match="JSON"):
        replace(meta, recipe={"x": object()}).to_metadata()


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"format_version": 1}', b'{"format_version": 1, "x": 2}']
)
def test_metadata_that_cannot_be_understood_names_the_source(text):
    with pytest.raises(TrajectoryError, match=r"^some/file: its lad_dist metadata"):
        BufferMeta.from_metadata({META_KEY: text}, "some/file")


def test_another_format_version_is_refused(meta):
    fields = json.loads(meta.to_metadata()[META_KEY]) | {"format_version": 2}
    with pytest.raises(TrajectoryError, match="format version 2; this lad-dist reads version 1"):
        BufferMeta.from_metadata({META_KEY: json.dumps(fields).encode()}, "f")


@pytest.mark.parametrize(
    "key", [("representation", 7, 0, 9), ("classifier", 0, 3, 3), ("classifier", 12345, 9999, 10000)]
)
def test_part_paths_are_parsed_back(key):
    assert parse_part_path(part_path(*key)) == key


def test_part_paths_look_as_documented():
    assert part_path("classifier", 7, 0, 9) == "classifier/expert-0007/epochs-0000-0009.parquet"


@pytest.mark.parametrize(
    "path",
    [
        "classifier/expert-0007/.epochs-0000-0009.parquet",
        "classifier/expert-0007/.epochs-0000-0009.parquet.host.12.ab.tmp",
        "classifier/expert-0007/epochs-0009-0000.parquet",
        "classifier/expert-00007/epochs-0000-0009.parquet",  # two names for one part
        "classifier/expert-7/epochs-0000-0009.parquet",
        "head/expert-0007/epochs-0000-0009.parquet",
        "x/classifier/expert-0007/epochs-0000-0009.parquet",
        "classifier/expert-0007/epochs-0000-0009.parquet\n",
        "classifier/expert-\u0660\u0660\u0660\u0667/epochs-0000-0009.parquet",  # Arabic digits
    ],
)
def test_foreign_paths_are_not_parts(path):
    assert parse_part_path(path) is None
