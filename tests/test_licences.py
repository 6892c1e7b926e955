"""Which licence a model with many parts has: the most demanding of them, and no more freedom than any part gives."""

import pytest

from audiophi.publishing.licences import binding_licence, parse_licence


def licensed(*texts):
    return {str(number): parse_licence(text) for number, text in enumerate(texts)}


@pytest.mark.parametrize(
    "parts, expected",
    [
        (["mit", "apache-2.0"], "apache-2.0"),
        (["mit", "cc-by-4.0", "permissive: made here"], "cc-by-4.0"),
        (["apache-2.0", "cc-by-sa-3.0"], "cc-by-sa-3.0"),
        (["mit", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
        (["cc-by-nc-3.0", "cc-by-nc-4.0", "mit"], "cc-by-nc-4.0"),
        (["cc-by-nc-3.0", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
        (["cc-by-sa-3.0", "cc-by-nc-sa-4.0"], "non-commercial-see-licences"),
        (["mit", "non-commercial: research only"], "non-commercial-see-licences"),
        (["cc-by-sa-3.0", "cc-by-sa-4.0"], "several-see-licences"),
        (["mit", "unknown: who knows"], "unknown-parts"),
        (["cc-by-nc-4.0", "unknown: who knows"], "non-commercial-and-unknown-parts"),
        (["mit", "llama3.2"], "llama3.2"),
        (["permissive: made here"], "permissive-see-licences"),
    ],
)
def test_the_most_demanding_licence_binds(parts, expected):
    found = binding_licence(licensed(*parts))
    assert found in ({"license": expected}, {"license": "other", "license_name": expected})


@pytest.mark.parametrize(
    "parts, stated, allowed",
    [
        (["mit", "apache-2.0"], "mit", True),
        (["mit"], "cc-by-nc-4.0", True),
        (["mit", "cc-by-nc-4.0"], "mit", False),
        (["mit", "cc-by-nc-4.0"], "cc-by-sa-4.0", False),
        (["cc-by-sa-4.0"], "gpl-3.0", False),
        (["mit", "unknown: who knows"], "mit", False),
    ],
)
def test_nobody_can_allow_more_than_a_part(parts, stated, allowed):
    if allowed:
        assert binding_licence(licensed(*parts), stated) == {"license": stated}
    else:
        with pytest.raises(ValueError, match=f"licence {stated}"):
            binding_licence(licensed(*parts), stated)


@pytest.mark.parametrize("text", ["", "free for all", "generous: yes", "permissive:"])
def test_licences_are_identifiers_or_a_kind_with_a_text(text):
    with pytest.raises(ValueError, match="licence"):
        parse_licence(text)
