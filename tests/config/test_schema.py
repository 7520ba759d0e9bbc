from __future__ import annotations

import pytest

from megatron_vcr1.config.data_sections import DataSection, DataSource
from megatron_vcr1.config.evaluation_sections import BenchmarkSource
from megatron_vcr1.config.schema import RunConfig, entry_class, section_classes
from megatron_vcr1.config.section import Section

CLASSES: list[type[Section]] = [*section_classes().values(), DataSource, BenchmarkSource]


def test_section_names_are_those_of_the_toml_tables():
    classes = section_classes()
    assert list(classes) == list(RunConfig.model_fields)
    assert classes["data"] is DataSection


def test_arrays_of_tables_have_an_entry_class():
    found = {
        f"{name}.{key}": entry_class(field)
        for name, section in section_classes().items()
        for key, field in section.model_fields.items()
    }
    assert {name: entry for name, entry in found.items() if entry} == {
        "data.sources": DataSource,
        "evaluate.benchmarks": BenchmarkSource,
        "validation.benchmarks": BenchmarkSource,
    }


@pytest.mark.parametrize("section", CLASSES)
def test_sections_have_at_most_20_keys(section):
    assert len(section.model_fields) <= 20, "split the section by concept"


@pytest.mark.parametrize("section", CLASSES)
def test_descriptions_are_sentences_that_stand_alone(section):
    descriptions = {key: field.description or "" for key, field in section.model_fields.items()}
    descriptions[section.__name__] = section.__doc__ or ""
    for key, text in descriptions.items():
        assert text.endswith(".") and text[0].isupper(), f"{key}: {text!r} is not a sentence"
        assert not text.startswith(("Of ", "And ", "What ", "Whose ", "Where it ")), f"{key}: {text!r} is a fragment"
        assert len(text.split()) >= 4, f"{key}: {text!r} says too little"
