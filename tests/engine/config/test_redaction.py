"""What must not be printed or saved, and what must stay."""

from typing import Any

import pytest

from narrowgauge.engine.config.redaction import redact, redact_text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"comet": {"api_key": "k1", "enabled": True}}, {"comet": {"api_key": "***", "enabled": True}}),
        ({"hf_token": "k", "HF-TOKEN": "k"}, {"hf_token": "***", "HF-TOKEN": "***"}),
        ({"password": 12345}, {"password": "***"}),
        ({"launch": {"environment": {"A": "k", "B": "2"}}}, {"launch": {"environment": {"A": "***", "B": "***"}}}),
        ({"api_keys": ["a", "b"]}, {"api_keys": ["***", "***"]}),
        ({"environment": {"A": "k"}}, {"environment": {"A": "k"}}),
        ({"data": {"train": ["s3://u:p@host/x"]}}, {"data": {"train": ["s3://***@host/x"]}}),
        ({"training": {"sample_tokens": 64}, "tokenizer": "t"}, {"training": {"sample_tokens": 64}, "tokenizer": "t"}),
        ({"token": None}, {"token": None}),
    ],
)  # fmt: skip
def test_configurations(value: Any, expected: Any) -> None:
    assert redact(value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pa@ss@host/x: gone", "https://***@host/x: gone"),
        ("https://token@host", "https://***@host"),
        ("https://host/a@b and c@d", "https://host/a@b and c@d"),
        ("no URL: a@b", "no URL: a@b"),
        ("https://host/x?token=k1&part=2", "https://host/x?token=***&part=2"),
        ("https://h/x?part=2&access_token=k1: gone", "https://h/x?part=2&access_token=*** gone"),
        ("s3://b/x?X-Amz-Signature=ab12&X-Amz-Date=1", "s3://b/x?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://h/x?sig=a%2Fb#key=c", "https://h/x?sig=***#key=***"),
        ("https://h/x?accessToken=k1&apiSecret=k2&part=2", "https://h/x?accessToken=***&apiSecret=***&part=2"),
        ("https://h/x?jwt=k1&monkey=2", "https://h/x?jwt=***&monkey=2"),
        (
            "https://h/x?code=k1&session=k2&%74oken=k3&token[]=k4",
            "https://h/x?code=***&session=***&%74oken=***&token[]=***",
        ),
        ("https://h/x?a[token]=k1&%2574oken=k2&b[c]=1", "https://h/x?a[token]=***&%2574oken=***&b[c]=1"),
        ("https://h/x?password=a%26b&c=1", "https://h/x?password=***&c=1"),
        (
            "https://h/x?next=https%3A%2F%2Fg%2Fy%3Fa%3D1%26token%3Dk1%26b%3D2&c=3",
            "https://h/x?next=https%3A%2F%2Fg%2Fy%3Fa%3D1%26token%3D***%26b%3D2&c=3",
        ),
        ("https://h/x?next=g%253Ftoken%253dk1%2526b", "https://h/x?next=g%253Ftoken%253d***%2526b"),
        ("https://h/x?next=https://g/y?token=k1&b=2", "https://h/x?next=https://g/y?token=***&b=2"),
        ("https://h/x?a=b?sig=k1", "https://h/x?a=b?sig=***"),
        ("https://h/x?token=k1?sig=k2&b=2", "https://h/x?token=***&b=2"),
        ("?a=" * 5000, "?a=" * 5000),
        ("https://h/x?q=token=a&barcode=b&decode=c", "https://h/x?q=token=a&barcode=b&decode=c"),
        ("https://h/x?tokenizer=a&keys_of=b", "https://h/x?tokenizer=a&keys_of=b"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert redact_text(text) == expected
