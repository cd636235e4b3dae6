"""Tests of the grammar: scale words, decorations, signs for "not equal"."""

import fractions

from absl.testing import absltest, parameterized

from synthneg_jax.grading import answer_tree as tree
from synthneg_jax.grading.answer_equality import Ambiguous, same
from synthneg_jax.grading.answer_grammar import parse
from synthneg_jax.grading.answer_numbers import exact
from synthneg_jax.grading.answer_tokens import Unreadable


class ScaleTest(parameterized.TestCase):
  @parameterized.parameters(
    ("7 million", "7000000"), (r"7\text{ million}", "7000000"), ("1.5 billion", "1500000000"),
    ("3 hundred", "300"), ("12 thousand", "12000"), ("2 trillion", "2000000000000"),
    ("2.5 dozen eggs", "30 eggs"), (r"2\text{ dozen eggs}", "24"),
    ("7 million dollars", r"\$7000000"),
    (r"\$7\text{ million}", "7000000 dollars"), (r"\$7k", "7000"), ("$7K", "7000"),
    ("$1.5M", "1500000"),
    (r"\$2bn", "2000000000"), ("€3B", "3000000000"), ("$7 per dozen", "7"),
    (r"7\text{ cents per dozen}", "7"),
    ("-7 million", "-7000000"), ("half", r"\text{half}"), ("5 dozen dozens", "720"),
  )  # fmt: skip
  def test_scale_words_multiply(self, text, equal):
    # Fails if a scale word is dropped or refused, or if one in a unit ("per dozen") multiplies.
    self.assertTrue(same(parse(equal), parse(text)))

  def test_the_value_is_exact(self):
    self.assertEqual(exact(parse("0.1 million")), fractions.Fraction(100000))

  @parameterized.parameters(
    ("7 million", "7"), ("7 dozen", "7"), (r"\$7k", "7"), ("$7M", "7"), ("7k", "7")
  )
  def test_scaled_numbers_are_others(self, text, gold):
    self.assertFalse(same(parse(gold), parse(text)))

  @parameterized.parameters(
    "7 tenths", "7 hundredths", "2 thirds", "3 fifths", "5 factorial", "5 squared", "7 dollars "
                                                                                    "million",
    r"7\text{ less}", "7 hundreds", r"7\text{ is wrong}", "7 apples is impossible",
  )  # fmt: skip
  def test_words_that_make_another_number_are_refused(self, text):
    # Fails if a word that changes the number counts as its unit.
    with self.assertRaises(Unreadable):
      parse(text)

  @parameterized.parameters(
    "7 or more", r"7\text{ or more}", "7 and a half", r"7\text{ and a half}"
  )
  def test_hedges_are_lists(self, text):
    # Fails if the first number of a hedge is read as the answer.
    with self.assertRaises(Ambiguous):
      same(parse("7"), parse(text))


class DecorationTest(parameterized.TestCase):
  @parameterized.parameters(
    r"\textcolor{red}{13}", r"{\color{red}13}", r"\color{blue}{13}", r"{\color{red} 13}",
    r"\colorbox{yellow}{13}",
    r"\fcolorbox{red}{white}{13}", r"\underline{13}", r"\underbrace{13}", r"\boxed{13}",
    r"\fbox{13}",
    r"\framebox{13}", r"\bbox[5px,border:2px solid red]{13}", r"\bbox{13}", r"\large 13",
    r"{\huge 13}",
    r"13 \checkmark", "13 ✓", "13 ✅", '"13"', "“13”", "``13''", r"\textcolor{red}{\boxed{13}}",
    r"\color[rgb]{1,0,0}13",
  )  # fmt: skip
  def test_it_reads_as_what_it_shows(self, text):
    # Fails if colour, a frame, a size or quotes change an answer or make it unparsable.
    self.assertTrue(same(parse("13"), parse(text)), text)

  @parameterized.parameters(r"\cancel{7}", r"\sout{7}", r"\xcancel{7}", '7"8"')
  def test_what_is_crossed_out_is_unreadable(self, text):
    with self.assertRaises(Unreadable):
      parse(text)


class LabelTest(parameterized.TestCase):
  @parameterized.parameters(
    r"\text{Answer: }13",
    r"\text{The area: } 13",
    r"\text{Area} = 13",
    "Area: 13",
    r"\text{Area}: 13",
    "=13",
  )
  def test_a_label_is_skipped(self, text):
    # Fails if words before a colon or equals sign are read as part of the value.
    self.assertTrue(same(parse("13"), parse(text)))

  @parameterized.parameters(r"\text{Answer:}", r"\text{Answer: }")
  def test_a_label_alone_is_text(self, text):
    self.assertIsInstance(parse(text), tree.Text)


class NotEqualTest(parameterized.TestCase):
  @parameterized.parameters("=/=", "/=", r"\neq", r"\ne", "≠", "<>", "!=", r"\not=", r"\not =")
  def test_not_equal(self, sign):
    # Fails if a way of writing "not equal" is read as equality, division or two signs.
    node = parse(f"x {sign} 7")
    self.assertEqual(node, tree.Relation((tree.Symbol("x"), tree.number(7)), ("!=",)))
    self.assertFalse(same(parse("7"), node))
    self.assertTrue(same(parse(r"x \ne 7"), node))


if __name__ == "__main__":
  absltest.main()
