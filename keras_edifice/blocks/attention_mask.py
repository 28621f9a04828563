"""Which tokens see which, as a layer: causal, windowed, in blocks, by segments.

The conditions are those of `ops/masks.py`, joined by "and".
"""

import keras
from keras import layers

from keras_edifice.ops.masks import make_mask


@keras.saving.register_keras_serializable("keras_edifice")
class AttentionMask(layers.Layer):
    """(batch, time, ...) -> booleans (1 or batch, 1, time, time), True where visible.

    Computed from positions, so that it fits any length and a saved model holds no
    table. For attention layers that take a mask beside their input; those of this
    package make their own from the same options.

    Args:
        causal: hide later tokens.
        window: visible tokens including the own one, back in time; without `causal` as
            many on the other side.
        block_causal: length of blocks; later blocks are hidden.
        chunk: length of chunks; other chunks are hidden.
        dilation: distance of visible tokens from each other.
        prefix: tokens at the beginning that every token sees.
    """

    def __init__(
        self,
        causal=True,
        window=None,
        block_causal=None,
        chunk=None,
        dilation=None,
        prefix=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.causal, self.window = causal, window
        self.block_causal, self.chunk = block_causal, chunk
        self.dilation, self.prefix = dilation, prefix
        self.supports_masking = True

    def call(self, x, mask=None, segment_ids=None):
        """The mask.

        Args:
            x: tensor whose axis 1 are the tokens.
            mask: (batch, time), False for padding, which no token sees.
            segment_ids: (batch, time), whole numbers; other segments are hidden.
        """
        return make_mask(
            x,
            causal=self.causal,
            window=self.window,
            block_causal=self.block_causal,
            chunk=self.chunk,
            dilation=self.dilation or 1,  # with 1 nothing is hidden
            prefix=self.prefix,
            padding=mask,
            segment_ids=segment_ids,
        )

    def compute_mask(self, x, mask=None):
        return None
