"""Changes of real source that change no result, as `str` of a mutant has them, by the reason why no input would tell.

That gradients are the same is seen by the checks that these mutants pass.
"""

# ruff: noqa: E501
# fmt: off

OPERATIONS = {
    'the outer `where` or the factor 0 masks it; NaN alone would tell (tests/ops/test_values.py)': [
        'pointwise.elu_backward: 0  ->  1  in  return where(z <= 0, dy * alpha * exp(where(z < 0, z, 0)), dy)  #1',
        'pointwise.elu_backward: 0  ->  1  in  return where(z <= 0, dy * alpha * exp(where(z < 0, z, 0)), dy)  #2',
        'nll_loss.nll_slope: (hit > 0) & (target != ignored)  ->  target != ignored  in  return where((hit > 0) & (target != ignored), slope, 0)  # 0 elsewhere, also where what comes from above is NaN',
        'cross_entropy.label_slope: 0 * p  ->  0 / p  in  return where(target == ignored, 0 * p, scale / count * p - scale / count * true)',
        'cross_entropy.label_slope: 0 * p  ->  0  in  return where(target == ignored, 0 * p, scale / count * p - scale / count * true)',
        'class_loss.from_above: 0  ->  1  in  weights = torch.where(counted, weight.to(dy.dtype)[torch.where(counted, labels, 0)], 0)',
    ],
    'the engine sums a gradient down to the shape of its input': [
        'linear.linear_backward: rows.sum(0)  ->  rows  in  db = rows.sum(0)',
    ],
    'computes a gradient that nobody asked for, which the engine drops': [
        'squared_error._squared_error_slopes: slope if wanted[0] else None  ->  slope  in  return slope if wanted[0] else None, -slope if wanted[1] else None',
        'squared_error._squared_error_slopes: -slope if wanted[1] else None  ->  -slope  in  return slope if wanted[0] else None, -slope if wanted[1] else None',
        'binary_cross_entropy._bce_slopes: bce_backward(dy, x, t, **numbers) if wanted[0] else None  ->  bce_backward(dy, x, t, **numbers)  in  bce_backward(dy, x, t, **numbers) if wanted[0] else None,',
        'binary_cross_entropy._bce_slopes: bce_target_backward(dy, x, t, **numbers) if wanted[1] else None  ->  bce_target_backward(dy, x, t, **numbers)  in  bce_target_backward(dy, x, t, **numbers) if wanted[1] else None,',
        'layer_norm.LayerNorm.backward: dx if wanted[0] else None  ->  dx  in  return dx if wanted[0] else None, dw, narrow(shaped(db, shape), ctx.bias) if wanted[2] else None, None, None',
        'layer_norm.layer_norm_backward: column_sum(dy * standard) if wanted[1] else None  ->  column_sum(dy * standard)  in  return dx, column_sum(dy * standard) if wanted[1] else None, column_sum(dy) if wanted[2] else None',
        'layer_norm.layer_norm_backward: column_sum(dy) if wanted[2] else None  ->  column_sum(dy)  in  return dx, column_sum(dy * standard) if wanted[1] else None, column_sum(dy) if wanted[2] else None',
    ],
    'without a class weight they are not used': [
        'binary_cross_entropy._bce_logits_slopes: (None, None) if p is None else (log_s(z), log_s(-z))  ->  (log_s(z), log_s(-z))  in  positive, negative = (None, None) if p is None else (log_s(z), log_s(-z))',
    ],
    'within 1e-12 of an end, where torch cuts the logarithm off': [
        'binary_cross_entropy.bce_backward: maximum((1 - x) * x, 1e-12)  ->  (1 - x) * x  in  slope = scale * factor * (x - t) / maximum((1 - x) * x, 1e-12)',
        'binary_cross_entropy.bce_backward: 1e-12  ->  1.0009999999999999e-12  in  slope = scale * factor * (x - t) / maximum((1 - x) * x, 1e-12)',
    ],
    'the next argument needs no gradient, and is not read': [
        'elementwise_loss.elementwise_loss.Loss.backward: 2  ->  3  in  dx, dt = slopes(dy, x, t, pos_weight, ctx.needs_input_grad[:2], **numbers)',
        'cross_entropy.SoftCrossEntropy.backward: 3  ->  4  in  wanted = ctx.needs_input_grad[:3]',
        'layer_norm.LayerNorm.backward: 3  ->  4  in  wanted = ctx.needs_input_grad[:3]',
        'batch_norm.BatchNorm.backward: 3  ->  4  in  wanted = ctx.needs_input_grad[:3]',
        'linear_activation.linear_activation.LinearActivation.backward: 3  ->  4  in  return *linear_backward(connected(dz, kept), a, weight, ctx.needs_input_grad[:3]), *nothing',
    ],
    'it is 1 where it is used': [
        'nll_loss.nll_slope: -(scale / count) * hit  ->  -(scale / count)  in  slope = -(scale / count) * hit if rows is None else -rows * hit',
        'nll_loss.nll_slope: -rows * hit  ->  -rows  in  slope = -(scale / count) * hit if rows is None else -rows * hit',
    ],
    'without smoothing both ways give the same': [
        'cross_entropy.cross_entropy_backward: even is not None and smoothing  ->  even is not None  in  if even is not None and smoothing:',
    ],
    'every class has the same shape': [
        'cross_entropy.cross_entropy_backward: 0  ->  1  in  even = even.reshape(z.select(dim, 0).shape).unsqueeze(dim)',
    ],
    'runs for tensors without elements alone': [
        'cross_entropy.soft_cross_entropy_backward: 1  ->  2  in  spread = smoothing / max(classes, 1)',
        'cross_entropy.soft_cross_entropy_backward: 1  ->  2  in  dy = dy / (z.numel() // max(classes, 1))',
        'cross_entropy.soft_cross_entropy_backward: wanted[0] and classes  ->  wanted[0]  in  if wanted[0] and classes:',
        'cross_entropy.soft_cross_entropy_backward: 0  ->  1  in  elif wanted[0]:',
        'cross_entropy.soft_cross_entropy_backward: 0  ->  1  in  dz = z.to(dtypes[0])',
        'layer_norm.LayerNorm.backward: dy * wide_x  ->  dy / wide_x  in  dx = dy * wide_x',
        'layer_norm.LayerNorm.backward: dy * wide_x  ->  dy  in  dx = dy * wide_x',
        'layer_norm.LayerNorm.backward: dy * wide_x  ->  wide_x  in  dx = dy * wide_x',
        'layer_norm.LayerNorm.backward: dx.sum_to_size(shape) if want else None  ->  dx.sum_to_size(shape)  in  dw, db = (dx.sum_to_size(shape) if want else None for want in wanted[1:])',
        'layer_norm.LayerNorm.backward: dx.sum_to_size(shape) if want else None  ->  None  in  dw, db = (dx.sum_to_size(shape) if want else None for want in wanted[1:])',
        'layer_norm.LayerNorm.backward: 1  ->  2  in  dw, db = (dx.sum_to_size(shape) if want else None for want in wanted[1:])',
    ],
    'where there are rows, they are used': [
        'cross_entropy.soft_cross_entropy_backward: {} if reduction == NONE else {\'scale\': dy}  ->  {\'scale\': dy}  in  options = {} if reduction == NONE else {"scale": dy}',
        'cross_entropy.soft_cross_entropy_backward: to_rows(rows, dim) if reduction == NONE else None  ->  to_rows(rows, dim)  in  column_of_rows = to_rows(rows, dim) if reduction == NONE else None',
    ],
    'all dtypes are alike but in half precision': [
        'cross_entropy.soft_cross_entropy_backward: dz = dz.to(dtypes[0])  ->  pass  in  dz = dz.to(dtypes[0])',
        'cross_entropy.soft_cross_entropy_backward: 0  ->  1  in  dz = dz.to(dtypes[0])',
        'layer_norm.LayerNorm.backward: dx = narrow(dx, x.dtype)  ->  pass  in  dx = narrow(dx, x.dtype)',
        'batch_norm.batch_norm_backward: dx = narrow(dx, x.dtype)  ->  pass  in  dx = narrow(dx, x.dtype)',
        'batch_norm_activation.BatchNormActivation.backward: None if bias is None else bias.dtype  ->  None  in  bias_dtype = None if bias is None else bias.dtype',
        'batch_norm_activation.BatchNormActivation.backward: None if bias is None else bias.dtype  ->  bias.dtype  in  bias_dtype = None if bias is None else bias.dtype',
    ],
    'softmax does not change with a shift; it keeps exp from overflow (tests/ops/test_values.py)': [
        'cross_entropy.soft_slope: z - top  ->  z + top  in  p = exp(z - top)',
        'cross_entropy.soft_slope: z - top  ->  z  in  p = exp(z - top)',
    ],
    'a faster way to the same result, with a slower one for the rest': [
        'class_loss.column: target.unsqueeze(1) if target.dim() == 1 else target.reshape(-1, 1)  ->  target.reshape(-1, 1)  in  labels = target.unsqueeze(1) if target.dim() == 1 else target.reshape(-1, 1)',
        'rows.from_rows: 1  ->  2  in  if like.dim() == 2 and dim in (1, -1):',
        'rows.from_rows: -1  ->  1  in  if like.dim() == 2 and dim in (1, -1):',
        'rows.from_rows: 1  ->  2  in  if like.dim() == 2 and dim in (1, -1):  #1',
        'rows.to_rows: 1  ->  2  in  if tensor.dim() == 2 and dim in (1, -1):',
        'rows.to_rows: -1  ->  1  in  if tensor.dim() == 2 and dim in (1, -1):',
        'rows.to_rows: 1  ->  2  in  if tensor.dim() == 2 and dim in (1, -1):  #1',
    ],
    'replacing the index by -1, or not: kernels alone count in float32': [
        'class_loss.column: abs(ignored) < 2 ** 24  ->  abs(ignored) > 2 ** 24  in  if abs(ignored) < 2**24:',
        'class_loss.column: abs(ignored)  ->  ignored  in  if abs(ignored) < 2**24:',
        'class_loss.column: 2 ** 24  ->  2 * 24  in  if abs(ignored) < 2**24:',
        'class_loss.column: 2 ** 24  ->  24 ** 2  in  if abs(ignored) < 2**24:',
        'class_loss.column: 2 ** 24  ->  2  in  if abs(ignored) < 2**24:',
        'class_loss.column: 2  ->  3  in  if abs(ignored) < 2**24:',
        'class_loss.column: 24  ->  25  in  if abs(ignored) < 2**24:',
    ],
    'counted anew, it is the same number': [
        'class_loss.from_above: reduction == MEAN  ->  reduction != MEAN  in  if weight is None and reduction == MEAN and count is not None:',
    ],
    'of no row that counts the loss is NaN': [
        'class_loss.from_above: number(counted).clamp(min=1)  ->  number(counted)  in  return None, {"scale": dy, "count": number(counted).clamp(min=1)}, None',
    ],
    'too few gradients, of what is never asked for': [
        'layer_norm.LayerNorm.backward: (None,) * 5  ->  (None,) / 5  in  return (None,) * 5',
        'layer_norm.LayerNorm.backward: (None,) * 5  ->  (None,)  in  return (None,) * 5',
        'layer_norm.LayerNorm.backward: (None,) * 5  ->  5  in  return (None,) * 5',
        'layer_norm.LayerNorm.backward: 5  ->  6  in  return (None,) * 5',
        'linear_activation.linear_activation.LinearActivation.backward: (None,) * len(ctx.values)  ->  (None,)  in  nothing = (None,) * len(ctx.values)',
        'batch_norm_activation.BatchNormActivation.backward: 4  ->  5  in  nothing = (None,) * 4',
    ],
    'with `rest` taken off, a shift of x^ does not matter': [
        'batch_norm._sums_by.batch_norm_sums: x - mean  ->  x + mean  in  standard = (x - mean) * inverse',
        'batch_norm._sums_by.batch_norm_sums: x - mean  ->  x  in  standard = (x - mean) * inverse',
    ],
    '`rest`, the sum of x^, is 0 but for rounding': [
        'batch_norm.batch_norm_backward: dw = torch.addcmul(dw, db, rest, value=-1 / n)  ->  pass  in  dw = torch.addcmul(dw, db, rest, value=-1 / n)',
        'batch_norm.batch_norm_backward: -1 / n  ->  -1 * n  in  dw = torch.addcmul(dw, db, rest, value=-1 / n)',
        'batch_norm.batch_norm_backward: -1 / n  ->  n / -1  in  dw = torch.addcmul(dw, db, rest, value=-1 / n)',
        'batch_norm.batch_norm_backward: -1 / n  ->  -1  in  dw = torch.addcmul(dw, db, rest, value=-1 / n)',
        'batch_norm.batch_norm_backward: -1 / n  ->  n  in  dw = torch.addcmul(dw, db, rest, value=-1 / n)',
        'batch_norm.batch_norm_backward: -1  ->  1  in  dw = torch.addcmul(dw, db, rest, value=-1 / n)',
        'batch_norm.batch_norm_backward: 1  ->  2  in  dw = torch.addcmul(dw, db, rest, value=-1 / n)',
    ],
    'there are no running statistics to move': [
        'batch_norm_activation.BatchNormActivation.backward: 0.0  ->  0.5  in  y = BatchNorm.forward(x, weight, bias, None, None, 0.0, eps)[0]',
    ],
    'of relu both tell the sign': [
        'batch_norm_activation.BatchNormActivation.backward: a if spec.saves is saves_output else y  ->  y  in  kept = a if spec.saves is saves_output else y',
    ],
    'a truth value too few or too many, of what is not read': [
        'batch_norm_activation.BatchNormActivation.backward: 3  ->  4  in  slopes = batch_norm_backward(dy, x, mean, inverse, weight, bias_dtype, wanted[:3])',
    ],
    'signals for both statistics come together: what reads one reads the other': [
        'standardize.statistics_backward: d_mean is None and d_inverse is None  ->  d_mean is None  in  if d_mean is None and d_inverse is None:',
        'standardize.statistics_backward: zero if d_mean is None else d_mean / count  ->  d_mean / count  in  by_mean = zero if d_mean is None else d_mean / count',
        'standardize.statistics_backward: zero if d_inverse is None else inverse.square() * d_inverse / count  ->  inverse.square() * d_inverse / count  in  return by_mean, zero if d_inverse is None else inverse.square() * d_inverse / count',
    ],
}

RULES = {
    'r is used where rho > 5 alone, and there it is the same': [
        'radam.RAdam.scalars: maximum(rho, 5.0)  ->  rho  in  long, longest = maximum(rho, 5.0), maximum(rho_inf, 5.0)  # where r is not used, it is still a number',
        'radam.RAdam.scalars: 5.0  ->  5.004999999999999  in  long, longest = maximum(rho, 5.0), maximum(rho_inf, 5.0)  # where r is not used, it is still a number',
        'radam.RAdam.scalars: 5.0  ->  5.004999999999999  in  long, longest = maximum(rho, 5.0), maximum(rho_inf, 5.0)  # where r is not used, it is still a number  #1',
    ],
    'the outer `where` or the factor 0 masks it; NaN alone would tell (tests/ops/test_values.py)': [
        'radam.radam: 1  ->  2  in  root = sqrt(where(rho > 5, exp_avg_sq, 1)) + eps',
    ],
    'the direction is 1 or -1, but for gradients of 0': [
        'lion.lion: lr * direction  ->  lr / direction  in  return param * (1 - lr * weight_decay) - lr * direction, exp_avg',
    ],
}
# fmt: on
