"""The documentation site builds without a warning; every link and anchor leads somewhere; every
public name is documented.
"""

import ast
import html
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
import yaml
from absl.testing import absltest, parameterized

from docs import generated_pages
from synthneg_jax import cli
from synthneg_jax.runtime import config_schema

pytestmark = pytest.mark.slow  # builds the site

ROOT = pathlib.Path(__file__).parents[1]
ROOT_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*ROOT_PAGES, *sorted((ROOT / "docs").rglob("*.md"))]
MADE = (
  "configuration.md",
  "commands.md",
  "contributing.md",
  "changelog.md",
  "index.md",
)  # of the site alone


def without_code(text: str) -> str:
  """Markdown without fenced and indented blocks and code spans, in which nothing is a link."""
  text = re.sub(r"(?ms)^```.*?^```", "", text)
  text = re.sub(r"(?m)^    .*$", "", text)
  return re.sub(r"`[^`\n]*`", "", text)


def anchors(text: str) -> set[str]:
  """As GitHub and the site make them of headings: lower case, punctuation dropped, spaces to
  hyphens.
  """
  headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", text))

  def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")

  return {slug(heading) for heading in headings}


def broken_links(page: pathlib.Path, text: str) -> list[str]:
  """Links of a page to missing files or headings; external links are not followed."""
  wrong = []
  for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)) + re.findall(
    r'(?:src|href)="([^"]+)"', text
  ):
    if re.match(r"\w+:", target):
      continue
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if file.parent == ROOT / "docs" and file.name in MADE and page.is_relative_to(ROOT / "docs"):
      continue  # the build, in strict mode, checks these
    if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
      wrong.append(target)
  return wrong


class SiteTest(absltest.TestCase):
  def test_it_builds_in_strict_mode(self):
    # Fails if a page, a link or an anchor of the site is wrong, the made pages too, or if a page is
    # not in the menu.
    with tempfile.TemporaryDirectory() as folder:
      command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
      done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
      )
      self.assertEqual(done.returncode, 0, done.stderr)
      self.assertNotIn("not included in the", done.stderr)
      site = pathlib.Path(folder)

      def read(name):
        text = html.unescape(re.sub(r"<[^>]+>", "", (site / name).read_text()))
        return " ".join(text.split())

      leaves = read("configuration.html")
      for name, _ in config_schema.leaves(config_schema.default()):
        self.assertIn(name, leaves)
      commands = read("commands.html")
      for name in cli.COMMANDS:
        self.assertIn(f"synthneg {name}", commands)
      self.assertIn("--profile_steps", commands)
      self.assertIn("dpo_loss", read("api/core.html"))
      self.assertIn("not the authors' code", read("index.html"))
      fetched = re.findall(
        r'<(?:link|script)[^>]+(?:href|src)="(https?:[^"]+)"', (site / "index.html").read_text()
      )
      self.assertEqual(fetched, [])  # fonts, scripts and styles come with the site

  def test_its_own_links_on_github(self):
    # Fails if a link of README or docs leads nowhere when the Markdown is read in place.
    self.assertGreater(len(PAGES), 18)
    wrong = {str(page.relative_to(ROOT)): broken_links(page, page.read_text()) for page in PAGES}
    self.assertEqual({page: links for page, links in wrong.items() if links}, {})

  def test_the_checker_sees(self):
    # Fails if the checker passes on anything.
    page = ROOT / "docs" / "pods.md"
    text = "[a](scaling.md) [b](gone.md) [c](scaling.md#meshes) [d](scaling.md#gone) [e](#gone) "
    text += "`[f](gone.md)` ![g](images/gone.png)"
    self.assertEqual(
      broken_links(page, text), ["gone.md", "scaling.md#gone", "#gone", "images/gone.png"]
    )


class ReferenceTest(absltest.TestCase):
  def test_every_leaf_is_shown_with_its_default_and_sentence(self):
    # Fails if the page overlooks a leaf, or shows another default, range, unit or sentence than the
    # schema has.
    rows = {
      row.split("`")[1]: row
      for row in generated_pages.configuration().splitlines()
      if row.startswith("| `")
    }
    self.assertEqual(set(rows), set(config_schema.LEAVES))
    for name, leaf in config_schema.LEAVES.items():
      for part in (repr(leaf.default), leaf.domain, leaf.unit, leaf.doc):
        self.assertIn(part.replace("|", "\\|"), rows[name])
      self.assertEqual(f"`{name}`*" in rows[name], not leaf.changes_results)

  def test_every_public_name_is_documented(self):
    # Fails if a module, class, function, method or property of the package has no docstring.
    missing = []
    for path in sorted((ROOT / "synthneg_jax").rglob("*.py")):
      source, name = path.read_text(), path.relative_to(ROOT).as_posix()
      if not ast.get_docstring(ast.parse(source)):
        missing.append(name)
      missing += [
        f"{name}: {public}" for public, _, text in generated_pages.public(source) if not text
      ]
    self.assertEqual(missing, [])

  def test_a_name_without_docstring_is_seen(self):
    # Fails if methods, properties or nested classes are overlooked, or if private names count.
    source = (
      "def a(x): pass\ndef _b(): pass\nclass C:\n  'Doc.'\n  def d(self): pass\n  "
      "@property\n  def e(self): 'Doc.'\n"
    )
    self.assertEqual(
      [name for name, _, text in generated_pages.public(source) if not text], ["a", "C.d"]
    )


class TroubleshootingTest(absltest.TestCase):
  def test_its_sentences_are_said(self):
    # Fails if the page quotes what no program says any more.
    sources = " ".join(path.read_text() for path in (ROOT / "synthneg_jax").rglob("*.py"))
    parts = []
    for path in (ROOT / "synthneg_jax").rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
          parts.append(
            "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
          )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
          parts.append(node.value)
    said = re.sub(r"\{[^}]*\}|%[sd]", "…", "\n".join(parts))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = [
      cell
      for row in re.findall(r"(?m)^\| (.*?) \|", page)
      for cell in re.findall(r"`([^`]+)`", row)
    ]
    self.assertGreater(len(table), 20)
    names = {name for name, _ in config_schema.leaves(config_schema.default())}
    for quoted in table:
      if quoted in names or re.fullmatch(r"[a-z_]+(/\w+)?", quoted):  # a leaf, a verdict, a metric
        self.assertTrue(quoted in names or f'"{quoted}"' in sources, quoted)
        continue
      pieces = [re.escape(piece) for piece in quoted.split("…")]
      self.assertRegex(said, "[^\n]*".join(pieces), quoted)


class CitationTest(parameterized.TestCase):
  def test_citation_file(self):
    # Fails if a field that CFF 1.2.0 demands is missing or of another type, or if its version is
    # not the package's.
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    self.assertEqual(cff["cff-version"], "1.2.0")
    self.assertContainsSubset({"cff-version", "message", "title", "authors"}, cff)
    known = (
      "cff-version message title type authors version license abstract keywords preferred-citation"
    ).split()
    self.assertContainsSubset(set(cff), known)
    self.assertEqual(cff["type"], "software")
    paper = cff["preferred-citation"]
    self.assertEqual(paper["type"], "conference-paper")
    for work in (cff, paper):
      self.assertNotEmpty(work["authors"])
      for author in work["authors"]:
        self.assertTrue({"family-names", "given-names"} == set(author) or {"name"} == set(author))
    readme = (ROOT / "README.md").read_text()
    names = " and ".join(
      f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]
    )
    self.assertIn("author={" + names + "}", readme)
    self.assertIn(paper["title"], readme.replace("{", "").replace("}", ""))

  def test_version(self):
    # Fails if changelog, citation and package tell of different versions.
    version = re.search(
      r'__version__ = "(.+)"', (ROOT / "synthneg_jax/__init__.py").read_text()
    ).group(1)
    self.assertEqual(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"], version)
    heads = re.findall(r"(?m)^## (.+)$", (ROOT / "CHANGELOG.md").read_text())
    self.assertEqual(heads[0], "Unreleased")
    self.assertEqual(heads[1].split()[0], version)


if __name__ == "__main__":
  absltest.main()
