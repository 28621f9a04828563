"""PyTorch's own kernels: dense, convolution, normalisation, pooling, attention.

Keras adds the bias of a dense layer in a second pass over its output, lays every image
out anew before and after a convolution, normalises batches in several passes, and
copies queries, keys and values. For batches TensorFlow has a kernel, too.
"""

import math

import keras
from keras import ops

from keras_edifice.backends.running_torch import kept, runs_now


class FusedDense:
    """Beside `keras.layers.Dense`, before it among the bases of a class."""

    def call(self, inputs, training=None):
        if self.bias is None or not runs_now(inputs):
            return super().call(inputs, training=training)
        kernel, bias = map(ops.convert_to_tensor, (self.kernel, self.bias))
        if inputs.dtype != kernel.dtype:
            return super().call(inputs, training=training)
        y = affine(inputs, kernel, bias)
        return y if self.activation is None else self.activation(y)

    def quantize(self, mode=None, type_check=True, config=None):
        super().quantize(mode, type_check=False, config=config)


def affine(x, kernel, bias=None):
    """One product for x W + b, whose gradient in W needs no transposition.

    Args:
        x: (..., in).
        kernel: W, (in, out).
        bias: b, (out,); None for none.
    """
    import torch

    rows = x.reshape(-1, x.shape[-1])
    y = rows @ kernel if bias is None else torch.addmm(bias, rows, kernel)
    return y.reshape(*x.shape[:-1], -1)


class FusedConvolution:
    """Beside a two-dimensional convolution of Keras, before it among the bases.

    PyTorch reads channels-last images as they lie in memory, if they are handed over as
    a view with the channels first.
    """

    def call(self, inputs):
        kernel = ops.convert_to_tensor(self.kernel)
        last = self.data_format == "channels_last"
        if not (last and runs_now(inputs) and inputs.dtype == kernel.dtype):
            return super().call(inputs)
        import torch

        bias = ops.convert_to_tensor(self.bias) if self.use_bias else None
        filters = kept(self, [kernel], lambda: self._filters(kernel))
        strides = self.strides
        if self.kernel_size == (1, 1):  # oneDNN's gradient with strides corrupts memory
            inputs, strides = inputs[:, :: strides[0], :: strides[1]].contiguous(), 1
        x, padding = self._padded(inputs.permute(0, 3, 1, 2), strides)
        y = torch.nn.functional.conv2d(
            x,
            filters,
            bias,
            strides,
            padding,
            self.dilation_rate,
            groups=x.shape[1] // filters.shape[1],
        ).permute(0, 2, 3, 1)
        return y if self.activation is None else self.activation(y)

    def _filters(self, kernel):
        """(height, width, in, out) -> (out, in, height, width), channels last."""
        from keras_edifice.backends.transposed_torch import Transposed

        *sizes, out = kernel.shape
        filters = Transposed.apply(kernel.reshape(-1, out))
        return filters.reshape(out, *sizes).permute(0, 3, 1, 2)

    def _padded(self, x, strides):
        """The images, and how many zeros PyTorch is to put around them itself."""
        if self.padding == "valid" or strides == 1:
            return x, 0
        import torch

        edges = []
        for n, size, stride, dilation in zip(
            x.shape[2:], self.kernel_size, self.strides, self.dilation_rate, strict=True
        ):
            reach = (math.ceil(n / stride) - 1) * stride + (size - 1) * dilation + 1
            missing = max(reach - n, 0)
            edges.append((missing // 2, missing - missing // 2))
        if all(before == after for before, after in edges):
            return x, [before for before, _ in edges]
        (top, bottom), (left, right) = edges
        return torch.nn.functional.pad(x, (left, right, top, bottom)), 0


class FusedDepthwiseConvolution(FusedConvolution):
    """The same beside `keras.layers.DepthwiseConv2D`."""

    def _filters(self, kernel):
        """(height, width, in, multiplier) -> (in · multiplier, 1, height, width)."""
        height, width, *channels = kernel.shape
        filters = kernel.permute(2, 3, 0, 1)
        return filters.reshape(math.prod(channels), 1, height, width)


class FusedBatchNorm:
    """Beside `keras.layers.BatchNormalization`, before it among the bases of a class.

    The channels must be last. On TensorFlow the kernel is for training alone.
    """

    def call(self, inputs, training=None, mask=None):
        train = training and self.trainable
        if self._fusible(inputs, mask):
            if runs_now(inputs):
                return self._by_torch(inputs, train)
            if train and self.center and keras.backend.backend() == "tensorflow":
                return self._by_tensorflow(inputs)
        return super().call(inputs, training=training, mask=mask)

    def _fusible(self, inputs, mask):
        plain = not (self.renorm or self.synchronized)
        last = self.axis in (-1, len(inputs.shape) - 1)
        single = ops.dtype(inputs) == self.compute_dtype == "float32"
        return plain and last and single and self.scale and mask is None

    def _by_torch(self, inputs, train):
        import torch

        weights = [self.gamma, self.beta, self.moving_mean, self.moving_variance]
        gamma, beta, *moving = (
            None if weight is None else ops.convert_to_tensor(weight)
            for weight in weights
        )
        x = inputs.reshape(1, 1, -1, inputs.shape[-1]).permute(0, 3, 1, 2)
        if train:
            y, mean, deviation = torch.native_batch_norm(
                x, gamma, beta, None, None, True, 0.0, self.epsilon
            )
            variance = deviation.detach() ** -2 - self.epsilon
            self._follow(mean.detach(), variance)
        else:
            y = torch.nn.functional.batch_norm(
                x, *moving, gamma, beta, False, 0.0, self.epsilon
            )
        return y.permute(0, 2, 3, 1).reshape(inputs.shape)

    def _by_tensorflow(self, inputs):
        import tensorflow as tf

        channels = inputs.shape[-1]
        image = len(inputs.shape) == 4
        x = inputs if image else tf.reshape(inputs, (1, 1, -1, channels))
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=ops.convert_to_tensor(self.gamma),
            offset=ops.convert_to_tensor(self.beta),
            mean=tf.constant([], x.dtype),
            variance=tf.constant([], x.dtype),
            epsilon=self.epsilon,
            is_training=True,
        )
        count = ops.cast(tf.size(x) // channels, x.dtype)
        variance = variance * (count - 1.0) / count  # it divides by one less
        self._follow(tf.stop_gradient(mean), tf.stop_gradient(variance))
        return y if image else tf.reshape(y, tf.shape(inputs))

    def _follow(self, mean, variance):
        """The moving averages, one step on."""
        for average, new in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            average.assign(average * self.momentum + new * (1.0 - self.momentum))


def max_pool(x, size, strides, padding):
    """(b, h, w, c) -> the largest value of each window; PyTorch alone.

    Args:
        x: images, channels last.
        size: side of a window.
        strides: distance between windows.
        padding: rows and columns added on each side, at most half a window.
    """
    import torch

    pool = torch.nn.functional.max_pool2d
    return pool(x.permute(0, 3, 1, 2), size, strides, padding).permute(0, 2, 3, 1)


def attention(q, k, v, scale, bias=None, causal=False):
    """(b, t, h, d), (b, s, h, d), (b, s, h, d) -> (b, t, h, d); PyTorch alone.

    Args:
        q: queries.
        k: keys.
        v: values.
        scale: of the scores.
        bias: added to the scores, (b or 1, h or 1, t, s); None for nothing.
        causal: whether later keys are hidden.
    """
    import torch

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, bias, is_causal=causal, scale=scale).transpose(1, 2)
