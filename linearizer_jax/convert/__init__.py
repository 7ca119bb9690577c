"""Weights in and out: one table of names per family, used both ways.

A new family is a file of tables (their form: `convert/tables.py`) and a row
here.
"""

from linearizer_jax.convert import adventurer, clip, hf_vit

# family -> its spellings
FAMILIES = {
  'adventurer': (adventurer.ADVENTURER,),
  'clip': (clip.HUGGING_FACE, clip.OPENAI),
  'dinov2': (hf_vit.DINOV2,),
  'siglip': (hf_vit.SIGLIP,),
  'vit': (hf_vit.VIT,),
}
