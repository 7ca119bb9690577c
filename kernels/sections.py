"""Pages of which commands write parts, between two comments."""

import pathlib


def rewrite(path, name, text):
  """Replaces the section `name` of a page, or adds it at the end.

  A section stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; all
  else on the page stays as it is.

  Args:
    path: a Markdown file, which need not be there.
    name: of the section, such as 'benchmark gpu'.
    text: Markdown that goes between the comments.

  Raises:
    ValueError: one of the two comments is missing, or there are several.
  """
  path = pathlib.Path(path)
  page = path.read_text(encoding='utf-8') if path.exists() else ''
  begin, end = f'<!-- begin {name} -->', f'<!-- end {name} -->'
  section = f'{begin}\n\n{text.strip()}\n\n{end}'
  counts = page.count(begin), page.count(end)
  if counts == (0, 0):
    page = f'{page.rstrip()}\n\n{section}\n'.lstrip()
  elif counts == (1, 1) and page.index(begin) < page.index(end):
    before, rest = page.split(begin)
    page = before + section + rest.split(end)[1]
  else:
    raise ValueError(
      f'{path} has {counts[0]} of {begin} and {counts[1]} of {end}; expected '
      'one of each, in this order, or neither.'
    )
  path.write_text(page, encoding='utf-8')
