"""Names of CLIP's image tower in its published spellings."""

_OPENAI_BLOCK = 'visual.transformer.resblocks.{n}.'
_HF_BLOCK = 'vision_model.encoder.layers.{n}.'

# OpenAI's archive and OpenCLIP's checkpoints; our names come from here.
OPENAI = {
  'prefix': 'visual.',
  'ignored': (
    'transformer.*',
    'token_embedding.*',
    'positional_embedding',
    'ln_final.*',
    'text_projection',
    'text.*',
    'logit_scale',
    'logit_bias',
    'input_resolution',
    'context_length',
    'vocab_size',
    'visual.proj',
  ),
  'rows': (
    ('class_embedding', 'visual.class_embedding', 'same'),
    ('positional_embedding', 'visual.positional_embedding', 'same'),
    ('conv1', 'visual.conv1', 'conv'),
    ('ln_pre', 'visual.ln_pre', 'norm'),
    ('resblocks_{n}/ln_1', _OPENAI_BLOCK + 'ln_1', 'norm'),
    (
      'resblocks_{n}/attn/in_proj/kernel',
      _OPENAI_BLOCK + 'attn.in_proj_weight',
      'transpose',
    ),
    (
      'resblocks_{n}/attn/in_proj/bias',
      _OPENAI_BLOCK + 'attn.in_proj_bias',
      'same',
    ),
    (
      'resblocks_{n}/attn/out_proj',
      _OPENAI_BLOCK + 'attn.out_proj',
      'linear',
    ),
    ('resblocks_{n}/ln_2', _OPENAI_BLOCK + 'ln_2', 'norm'),
    ('resblocks_{n}/mlp/c_fc', _OPENAI_BLOCK + 'mlp.c_fc', 'linear'),
    ('resblocks_{n}/mlp/c_proj', _OPENAI_BLOCK + 'mlp.c_proj', 'linear'),
    ('ln_post', 'visual.ln_post', 'norm'),
    ('proj', 'visual.proj', 'same'),
  ),
}

# transformers' CLIPModel, CLIPVisionModelWithProjection, and CLIPVisionModel,
# whose newer releases write no prefix.
HUGGING_FACE = {
  'prefix': 'vision_model.',
  'ignored': (
    'text_model.*',
    'text_projection.weight',
    'visual_projection.weight',
    'logit_scale',
    'vision_model.embeddings.position_ids',
  ),
  'rows': (
    ('class_embedding', 'vision_model.embeddings.class_embedding', 'same'),
    (
      'positional_embedding',
      'vision_model.embeddings.position_embedding.weight',
      'same',
    ),
    ('conv1', 'vision_model.embeddings.patch_embedding', 'conv'),
    ('ln_pre', 'vision_model.pre_layrnorm', 'norm'),  # their spelling
    ('resblocks_{n}/ln_1', _HF_BLOCK + 'layer_norm1', 'norm'),
    (
      'resblocks_{n}/attn/in_proj',
      (
        _HF_BLOCK + 'self_attn.q_proj',
        _HF_BLOCK + 'self_attn.k_proj',
        _HF_BLOCK + 'self_attn.v_proj',
      ),
      'linear',
    ),
    ('resblocks_{n}/attn/out_proj', _HF_BLOCK + 'self_attn.out_proj', 'linear'),
    ('resblocks_{n}/ln_2', _HF_BLOCK + 'layer_norm2', 'norm'),
    ('resblocks_{n}/mlp/c_fc', _HF_BLOCK + 'mlp.fc1', 'linear'),
    ('resblocks_{n}/mlp/c_proj', _HF_BLOCK + 'mlp.fc2', 'linear'),
    ('ln_post', 'vision_model.post_layernorm', 'norm'),
    ('proj', 'visual_projection.weight', 'transpose'),
  ),
}
