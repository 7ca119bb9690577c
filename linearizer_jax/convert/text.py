"""Class names as text embeddings of a CLIP, for zero-shot evaluation."""

import pathlib

import numpy as np

PROMPTS = ('a photo of a {}.',)


def embed_classes(teacher, classes, out, prompts=PROMPTS):
  """Writes the .npz that `config.classify.text_embeddings` names.

  A class is the mean of its prompts' unit embeddings, of unit length again.
  Source: CLIP (arXiv 2103.00020), section 3.1.4.

  Args:
    teacher: hub repository or folder of a whole CLIP in Hugging Face's layout,
      with its text tower and tokenizer.
    classes: names in the order of the labels.
    out: file that ends in .npz; holds 'embeddings' float32 (V, E) and
      'classes' (V,).
    prompts: texts with one {} for the name.

  Raises:
    ValueError: no class, a name twice, a prompt without {}, or another suffix.
    ImportError: torch or transformers is missing.
    OSError: nothing there, or no network.
  """
  out, classes, prompts = pathlib.Path(out), list(classes), list(prompts)
  if out.suffix != '.npz':
    raise ValueError(f'--out is {out}; expected a file that ends in .npz.')
  twice = sorted({name for name in classes if classes.count(name) > 1})
  if not classes or twice:
    raise ValueError(
      f'class names have to differ, but {", ".join(twice)} is there twice.'
      if classes
      else 'there is no class name.'
    )
  for prompt in prompts:
    if prompt.count('{}') != 1:
      raise ValueError(
        f'prompt {prompt!r} needs one {{}}, where the name goes.'
      )
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ImportError(
      f'the text tower needs {error.name}: pip install torch transformers.'
    ) from error
  tower = transformers.CLIPTextModelWithProjection.from_pretrained(teacher)
  tokenizer = transformers.CLIPTokenizer.from_pretrained(teacher)
  rows = []
  for name in classes:
    texts = [prompt.replace('{}', name) for prompt in prompts]
    tokens = tokenizer(texts, padding=True, return_tensors='pt')
    with torch.no_grad():
      found = tower.eval()(**tokens).text_embeds
    found = torch.nn.functional.normalize(found, dim=-1).mean(0)
    rows.append(torch.nn.functional.normalize(found, dim=0).numpy())
  np.savez(out, embeddings=np.stack(rows), classes=np.array(classes))
