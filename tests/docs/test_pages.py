"""The pages of the documentation: length of the front page, links, pictures, navigation."""

import re
import tomllib

import pytest
import yaml
from PIL import Image

from evit_jax.reduction.registry import list_reducers
from tests.helpers import pages

README = pages.ROOT / 'README.md'
PROJECT = tomllib.loads((pages.ROOT / 'pyproject.toml').read_text())


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python objects."""


Loader.add_multi_constructor('tag:yaml.org,2002:python/', lambda loader, suffix, node: suffix)


def nav_pages(entry):
    values = entry.values() if isinstance(entry, dict) else entry
    return [entry] if isinstance(entry, str) else [page for value in values for page in nav_pages(value)]


def test_readme_has_at_most_150_lines():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize('page', pages.PAGES, ids=lambda page: page.name)
def test_page_links_only_to_existing_files_and_headings(page):
    for target in pages.links(page.read_text()):
        name, _, anchor = target.partition('#')
        file = page.parent / name if name else page
        assert file.exists(), f'{page.name} links to {target}'
        if anchor and file.suffix == '.md':
            assert anchor in pages.anchors(file.read_text()), f'{page.name} links to {target}'


@pytest.mark.parametrize('page', pages.PAGES, ids=lambda page: page.name)
def test_page_has_one_title_and_closed_code_blocks(page):
    text = page.read_text()
    assert text.count('```') % 2 == 0
    outside = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r'^# ', outside, re.MULTILINE)) == 1 and text.startswith('# ')


@pytest.mark.parametrize('page', pages.PAGES, ids=lambda page: page.name)
def test_page_lists_follow_an_empty_line(page):
    outside = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r'^(?![-\s\d]).+\n- .*', outside, re.MULTILINE)  # the site would show them as a paragraph


def test_navigation_of_the_site_has_every_page_once():
    config = yaml.load((pages.ROOT / 'mkdocs.yml').read_text(), Loader)
    listed = nav_pages(config['nav'])
    assert sorted(listed) == sorted(page.name for page in pages.DOCS.glob('*.md'))


def test_pictures_of_the_front_page_are_small():
    heroes = sorted(pages.DOCS.glob('hero_*.webp'))
    assert len(heroes) == 2 and all(file.stat().st_size < 400_000 for file in heroes)
    assert len({Image.open(file).size for file in heroes}) == 1


def test_readme_counts_every_reducer():
    assert f'{len(list_reducers())} methods' in README.read_text()


def test_methods_page_describes_every_reducer():
    text = (pages.DOCS / 'methods.md').read_text()
    assert not [name for name in list_reducers() if f'`{name}`' not in text]


def test_api_page_documents_every_public_name():
    import evit_jax
    documented = {line.rpartition('.')[2] for line in (pages.DOCS / 'api.md').read_text().splitlines()
                  if line.startswith('::: ')}
    assert documented == set(evit_jax.__all__)


def test_citation_names_the_version_of_the_project():
    citation = yaml.safe_load((pages.ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == PROJECT['project']['version']
    assert citation['preferred-citation']['year'] == 2022
