// Maps to pixels, as i2am.attribution.picture and i2am.plots.overlay draw them.

const taps = new Map();

// torch's bicubic weights (a = -0.75, pixels are areas, the border repeats) from `n` to `size`
function cubic(n, size) {
  const key = `${n} ${size}`;
  if (taps.has(key)) return taps.get(key);
  const at = new Int32Array(4 * size), weight = new Float64Array(4 * size), a = -0.75;
  const near = (x) => ((a + 2) * x - (a + 3)) * x * x + 1;
  const far = (x) => ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  for (let i = 0; i < size; i++) {
    const place = ((i + 0.5) * n) / size - 0.5, start = Math.floor(place), t = place - start;
    [far(t + 1), near(t), near(1 - t), far(2 - t)].forEach((w, k) => {
      at[4 * i + k] = Math.min(Math.max(start - 1 + k, 0), n - 1);
      weight[4 * i + k] = w;
    });
  }
  taps.set(key, { at, weight });
  return taps.get(key);
}

function enlarge(values, [rows, columns], width, height) {
  const across = cubic(columns, width), down = cubic(rows, height);
  const wide = new Float32Array(rows * width), result = new Float32Array(width * height);
  for (let row = 0, to = 0; row < rows; row++)
    for (let x = 0, from = row * columns; x < width; x++, to++) {
      const k = 4 * x, { at, weight } = across;
      wide[to] = weight[k] * values[from + at[k]] + weight[k + 1] * values[from + at[k + 1]] +
        weight[k + 2] * values[from + at[k + 2]] + weight[k + 3] * values[from + at[k + 3]];
    }
  for (let y = 0, to = 0; y < height; y++) {
    const k = 4 * y, { at, weight } = down;
    const [a, b, c, d] = [0, 1, 2, 3].map((j) => at[k + j] * width);
    const [p, q, r, s] = [0, 1, 2, 3].map((j) => weight[k + j]);
    for (let x = 0; x < width; x++, to++)
      result[to] = p * wide[a + x] + q * wide[b + x] + r * wide[c + x] + s * wide[d + x];
  }
  return result;
}

// A map that differs by no more than the rounding of fp32 sums says nothing and is 0 everywhere.
function unit(values, low, high) {
  const result = new Float32Array(values.length), span = high - low;
  if (span <= 1e-6 * Math.max(Math.abs(low), Math.abs(high))) return result;
  for (let i = 0; i < values.length; i++) result[i] = (values[i] - low) / span;
  return result;
}

// Values at the size of the picture, before clamping, inversion and threshold.
function pixelValues(values, grid, { low, high }, { width, height }, normalizations) {
  const result = enlarge(unit(values, low, high), grid, width, height);
  if (normalizations === 1) return result;
  const again = rangeOf(result);
  return unit(result, again.low, again.high);
}

// The picture, mostly grey, as it shows through where a map is 0.
function backdropOf(pixels) {
  const result = new Float32Array((pixels.length / 4) * 3);
  for (let i = 0, to = 0; i < pixels.length; i += 4) {
    const grey = 0.299 * pixels[i] + 0.587 * pixels[i + 1] + 0.114 * pixels[i + 2];
    for (let c = 0; c < 3; c++) result[to++] = 0.25 * pixels[i + c] + 0.75 * grey;
  }
  return result;
}

// Colours where the map is above the threshold; `target` holds the backdrop already.
function blend(target, backdrop, values, colors, { threshold, opacity, invert }) {
  for (let i = 0; i < values.length; i++) {
    const clamped = Math.min(Math.max(values[i], 0), 1), value = invert ? 1 - clamped : clamped;
    if (!(value > threshold)) continue;
    const weight = opacity * Math.min(2 * value, 1), rest = 1 - weight;
    const color = 3 * Math.round(value * 255), from = 3 * i, to = 4 * i;
    target[to] = rest * backdrop[from] + weight * colors[color];
    target[to + 1] = rest * backdrop[from + 1] + weight * colors[color + 1];
    target[to + 2] = rest * backdrop[from + 2] + weight * colors[color + 2];
  }
}
