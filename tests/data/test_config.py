import pytest

from jaxrm.data.config import DataConfig
from jaxrm.errors import UserError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", "vicuna"),
        ("preferred", "best"),
        ("train_on", "first"),
        ("too_long", "cut"),
        ("max_length", 1),
        ("batch_size", 0),
        ("max_records", 0),
        ("max_eval_records", -1),
        ("eval_share", 0.0),
        ("eval_share", 1.5),
        ("max_bad_share", -0.1),
    ],
)
def test_a_value_that_cannot_be_names_its_field_and_what_to_type(field, value):
    with pytest.raises(UserError, match=rf"^DataConfig\.{field} is .*e\.g\. {field}="):
        DataConfig(**{field: value})


def test_what_an_error_suggests_is_accepted():
    for field, value in (("max_length", 0), ("batch_size", 0), ("max_records", 0), ("max_eval_records", 0)):
        with pytest.raises(UserError) as error:
            DataConfig(**{field: value})
        DataConfig(**{field: int(str(error.value).rpartition("=")[2])})
