// Payloads to maps. A stack holds maps of one kind: see packing.py for its bytes.

function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

async function unpacked({ gzip, base64 }) {
  const bytes = bytesOf(base64);
  if (!gzip) return bytes.buffer;
  if (typeof DecompressionStream === "undefined")
    throw new Error("This browser cannot inflate the maps. Write the page again without compression, or use a newer browser.");
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

class Stack {
  constructor(entry, buffer) {
    const { offset, slices, grid, asked } = entry;
    Object.assign(this, { name: entry.name, slices, grid, asked, levels: entry.levels });
    this.queries = asked[0] * asked[1];
    this.cells = grid[0] * grid[1];
    const ranges = slices.length * this.queries;
    this.low = new Float32Array(buffer, offset, ranges);
    this.span = new Float32Array(buffer, offset + 4 * ranges, ranges);
    this.codes = new Uint8Array(buffer, offset + 8 * ranges, ranges * this.cells);
  }

  has(slice) {
    return this.slices.includes(slice);
  }

  // The mean over the queries of an area [row, column, last row, last column]; without one, query 0.
  read(slice, area = [0, 0, 0, 0]) {
    const { cells, queries, codes } = this, step = this.slices.length;
    const number = this.slices.indexOf(slice), values = new Float64Array(cells);
    const share = 1 / ((area[2] - area[0] + 1) * (area[3] - area[1] + 1));
    for (let row = area[0]; row <= area[2]; row++)
      for (let column = area[1]; column <= area[3]; column++) {
        const query = row * this.asked[1] + column, at = number * queries + query;
        const low = this.low[at] * share, unit = (this.span[at] / this.levels[number]) * share;
        let from = query * cells * step + number;
        for (let cell = 0; cell < cells; cell++, from += step) values[cell] += low + unit * codes[from];
      }
    return values;
  }
}

function rangeOf(values) {
  let low = Infinity, high = -Infinity, peak = 0, total = 0;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    total += value;
    if (value < low) low = value;
    if (value > high) { high = value; peak = i; }
  }
  return { low, high, peak, total };
}
