"""Names of DINOv2, SigLIP, MAE and supervised ViTs in Hugging Face's layout."""

_DINOV2_BLOCK = 'dinov2.encoder.layer.{n}.'
_SIGLIP_BLOCK = 'vision_model.encoder.layers.{n}.'
_VIT_BLOCK = 'vit.encoder.layer.{n}.'

# Dinov2Model and Dinov2WithRegistersModel.
DINOV2 = {
  'prefix': 'dinov2.',
  # Their classifier reads more than the class token.
  'ignored': ('dinov2.embeddings.mask_token', 'classifier.*'),
  'rows': (
    ('class_embedding', 'dinov2.embeddings.cls_token', 'lead2'),
    ('positional_embedding', 'dinov2.embeddings.position_embeddings', 'lead1'),
    ('registers', 'dinov2.embeddings.register_tokens', 'lead1'),
    ('conv1', 'dinov2.embeddings.patch_embeddings.projection', 'conv'),
    ('resblocks_{n}/ln_1', _DINOV2_BLOCK + 'norm1', 'norm'),
    (
      'resblocks_{n}/attn/in_proj',
      (
        _DINOV2_BLOCK + 'attention.attention.query',
        _DINOV2_BLOCK + 'attention.attention.key',
        _DINOV2_BLOCK + 'attention.attention.value',
      ),
      'linear',
    ),
    (
      'resblocks_{n}/attn/out_proj',
      _DINOV2_BLOCK + 'attention.output.dense',
      'linear',
    ),
    ('resblocks_{n}/ls_1', _DINOV2_BLOCK + 'layer_scale1.lambda1', 'same'),
    ('resblocks_{n}/ln_2', _DINOV2_BLOCK + 'norm2', 'norm'),
    ('resblocks_{n}/mlp/c_fc', _DINOV2_BLOCK + 'mlp.fc1', 'linear'),
    ('resblocks_{n}/mlp/c_proj', _DINOV2_BLOCK + 'mlp.fc2', 'linear'),
    ('resblocks_{n}/ls_2', _DINOV2_BLOCK + 'layer_scale2.lambda1', 'same'),
    ('ln_post', 'dinov2.layernorm', 'norm'),
  ),
}

# SiglipModel and SiglipVisionModel.
SIGLIP = {
  'prefix': 'vision_model.',
  'ignored': (
    'text_model.*',
    'logit_scale',
    'logit_bias',
    'vision_model.embeddings.position_ids',
  ),
  'rows': (
    (
      'positional_embedding',
      'vision_model.embeddings.position_embedding.weight',
      'same',
    ),
    ('conv1', 'vision_model.embeddings.patch_embedding', 'conv'),
    ('resblocks_{n}/ln_1', _SIGLIP_BLOCK + 'layer_norm1', 'norm'),
    (
      'resblocks_{n}/attn/in_proj',
      (
        _SIGLIP_BLOCK + 'self_attn.q_proj',
        _SIGLIP_BLOCK + 'self_attn.k_proj',
        _SIGLIP_BLOCK + 'self_attn.v_proj',
      ),
      'linear',
    ),
    (
      'resblocks_{n}/attn/out_proj',
      _SIGLIP_BLOCK + 'self_attn.out_proj',
      'linear',
    ),
    ('resblocks_{n}/ln_2', _SIGLIP_BLOCK + 'layer_norm2', 'norm'),
    ('resblocks_{n}/mlp/c_fc', _SIGLIP_BLOCK + 'mlp.fc1', 'linear'),
    ('resblocks_{n}/mlp/c_proj', _SIGLIP_BLOCK + 'mlp.fc2', 'linear'),
    ('ln_post', 'vision_model.post_layernorm', 'norm'),
    ('attnpool/probe', 'vision_model.head.probe', 'lead2'),
    (
      'attnpool/attn/in_proj/kernel',
      'vision_model.head.attention.in_proj_weight',
      'transpose',
    ),
    (
      'attnpool/attn/in_proj/bias',
      'vision_model.head.attention.in_proj_bias',
      'same',
    ),
    (
      'attnpool/attn/out_proj',
      'vision_model.head.attention.out_proj',
      'linear',
    ),
    ('attnpool/ln', 'vision_model.head.layernorm', 'norm'),
    ('attnpool/mlp/c_fc', 'vision_model.head.mlp.fc1', 'linear'),
    ('attnpool/mlp/c_proj', 'vision_model.head.mlp.fc2', 'linear'),
  ),
}

# ViTModel, ViTForImageClassification, ViTMAEModel, ViTMAEForPreTraining.
VIT = {
  'prefix': 'vit.',
  # The pooler is not part of any feature; the decoder is MAE's.
  'ignored': ('vit.pooler.*', 'classifier.*', 'decoder.*'),
  'rows': (
    ('class_embedding', 'vit.embeddings.cls_token', 'lead2'),
    ('positional_embedding', 'vit.embeddings.position_embeddings', 'lead1'),
    ('conv1', 'vit.embeddings.patch_embeddings.projection', 'conv'),
    ('resblocks_{n}/ln_1', _VIT_BLOCK + 'layernorm_before', 'norm'),
    (
      'resblocks_{n}/attn/in_proj',
      (
        _VIT_BLOCK + 'attention.attention.query',
        _VIT_BLOCK + 'attention.attention.key',
        _VIT_BLOCK + 'attention.attention.value',
      ),
      'linear',
    ),
    (
      'resblocks_{n}/attn/out_proj',
      _VIT_BLOCK + 'attention.output.dense',
      'linear',
    ),
    ('resblocks_{n}/ln_2', _VIT_BLOCK + 'layernorm_after', 'norm'),
    ('resblocks_{n}/mlp/c_fc', _VIT_BLOCK + 'intermediate.dense', 'linear'),
    ('resblocks_{n}/mlp/c_proj', _VIT_BLOCK + 'output.dense', 'linear'),
    ('ln_post', 'vit.layernorm', 'norm'),
    ('head', 'classifier', 'linear'),
  ),
}
