"""Shape letters bind at the first tensor that shows them and hold for the rest."""

import pytest
import torch

from dsv4.ops.shapes import Shapes, check_floating, check_integer


def test_letters_bind_to_the_sizes_of_the_first_tensor():
    shapes = Shapes()
    shapes.check("q", torch.zeros(2, 3, 5), "B T K")
    shapes.check("kv", torch.zeros(2, 7, 5), "B S K")
    assert [shapes.size(letter) for letter in "BTKS"] == [2, 3, 5, 7]


@pytest.mark.parametrize("leading", [(), (4,), (4, 3)])
def test_dots_allow_any_leading_dimensions(leading):
    shapes = Shapes()
    shapes.check("x", torch.zeros(*leading, 6), "... D")
    assert shapes.size("D") == 6


def test_numbers_are_sizes():
    Shapes().check("scale", torch.zeros(3), "3")
    with pytest.raises(ValueError, match=r"scale has shape \[4\]; expected \[3\]"):
        Shapes().check("scale", torch.zeros(4), "3")


def test_an_error_names_the_tensor_its_shape_and_where_the_size_came_from():
    shapes = Shapes()
    shapes.check("q", torch.zeros(2, 3), "B T")
    with pytest.raises(ValueError, match=r"k has shape \[2, 4\]; expected \[B, T\] with B = 2 \(from q\), T = 3"):
        shapes.check("k", torch.zeros(2, 4), "B T")


def test_a_letter_twice_in_one_tensor_means_a_square():
    with pytest.raises(ValueError, match=r"comb has shape \[3, 4\]; expected \[N, N\]"):
        Shapes().check("comb", torch.zeros(3, 4), "N N")


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4), ()])
def test_the_number_of_dimensions_must_match(shape):
    with pytest.raises(ValueError, match=r"x has shape .*; expected \[B, T\]"):
        Shapes().check("x", torch.zeros(shape), "B T")


def test_dots_still_need_the_named_dimensions():
    with pytest.raises(ValueError, match=r"x has shape \[4\]; expected \[\.\.\., N, N\]"):
        Shapes().check("x", torch.zeros(4), "... N N")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float32])
def test_integers_are_int64_and_nothing_else(dtype):
    check_integer("ids", torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"ids has dtype {dtype}; expected torch.int64"):
        check_integer("ids", torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floating_point_dtypes_pass(dtype):
    check_floating("x", torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_other_dtypes_are_not_floating_point(dtype):
    with pytest.raises(ValueError, match=f"x has dtype {dtype}; expected a floating-point dtype"):
        check_floating("x", torch.zeros(1, dtype=dtype))
