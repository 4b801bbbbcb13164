// One picture with what lies on it: the heat, outlines, the patch asked about, the peak.

const SVG = "http://www.w3.org/2000/svg";

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties))
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Every line on a picture is drawn twice, so that it shows on dark and on light ground.
function marked(svg, tag, kind) {
  const pair = ["halo", "line"].map((layer) => {
    const element = document.createElementNS(SVG, tag);
    element.setAttribute("class", `${kind} ${layer}`);
    element.setAttribute("vector-effect", "non-scaling-stroke");
    svg.append(element);
    return element;
  });
  return (attributes) => {
    for (const element of pair) {
      element.style.display = attributes ? "" : "none";
      for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
    }
  };
}

const SIDES = {
  generated: { title: "Generated", map: "r2g", maps: /^(share|r2g)/ },
  reference: { title: "Reference", map: "g2r", maps: /^g2r/ },
};

class Panel {
  constructor(sample, side) {
    const { source } = sample;
    Object.assign(this, { sample, side, source, picture: side === "generated" ? sample.generated : source.reference });
    if (!this.picture) return;
    this.title = side === "reference" && source.name ? source.name.replace(/^./u, (first) => first.toUpperCase()) : SIDES[side].title;
    const { width, height } = this.picture;
    this.canvas = make("canvas", { width, height });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.marks = document.createElementNS(SVG, "svg");
    this.marks.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.marks.setAttribute("aria-hidden", "true");
    this.outline = marked(this.marks, "path", "outline");
    this.truth = marked(this.marks, "circle", "truth");
    this.peak = marked(this.marks, "circle", "peak");
    this.box = marked(this.marks, "rect", "box");
    this.stage = make("div", { className: "stage" }, this.canvas, this.marks);
    this.stage.dataset.side = side;
    this.subtitle = make("span", { className: "subtitle" });
    this.score = make("span", { className: "score" });
    const ramp = make("canvas", { width: 256, height: 1, className: "ramp" });
    const colors = ramp.getContext("2d"), line = colors.createImageData(256, 1);
    for (let i = 0; i < 256; i++) line.data.set([...COLORS.subarray(3 * i, 3 * i + 3), 255], 4 * i);
    colors.putImageData(line, 0, 0);
    this.veil = make("i", { className: "veil" });
    this.ticks = ["low", "at", "high"].map((name) => make("span", { className: name }));
    this.scale = make("div", { className: "scale" }, make("div", { className: "bar" }, ramp, this.veil),
      make("div", { className: "ticks" }, ...this.ticks));
    this.figure = make("figure", {},
      make("figcaption", {}, make("b", { textContent: this.title }), this.score, this.subtitle), this.stage, this.scale);
    this.drawn = null;
  }

  async load() {
    const image = new Image(), { width, height } = this.picture;
    image.src = this.picture.src;
    await image.decode();
    this.context.drawImage(image, 0, 0, width, height);
    this.pixels = this.context.getImageData(0, 0, width, height);
    this.backdrop = backdropOf(this.pixels.data);
    this.output = this.context.createImageData(width, height);
    this.ground = new Uint8ClampedArray(this.output.data.length).fill(255);
    for (let i = 0; i < this.backdrop.length; i++) this.ground[i + Math.floor(i / 3)] = this.backdrop[i];
  }

  // `shown`: null for the plain picture, else { stack, slice, area, values, low, high, ... }
  draw(shown, { threshold, opacity }, key) {
    if (key === this.drawn) return;
    this.drawn = key;
    if (!shown) this.context.putImageData(this.pixels, 0, 0);
    else {
      const invert = this.side === "generated" && this.source.invert && shown.stack.name.startsWith("r2g");
      const values = pixelValues(shown.values, shown.stack.grid, shown, this.picture, this.sample.normalizations);
      this.output.data.set(this.ground);
      blend(this.output.data, this.backdrop, values, COLORS, { threshold, opacity, invert });
      this.context.putImageData(this.output, 0, 0);
    }
    this.scale.classList.toggle("off", !shown);
    if (!shown) return;
    this.veil.style.width = `${100 * threshold}%`;
    const level = shown.low + threshold * (shown.high - shown.low);
    [shown.low, level, shown.high].forEach((value, i) => { this.ticks[i].textContent = number(value); });
    this.ticks[1].style.left = `${100 * Math.min(Math.max(threshold, 0.2), 0.8)}%`;
    this.thin();
  }

  // The number at the mark gives way where it would lie on the others.
  thin() {
    this.ticks[1].hidden = false;
    const [low, at, high] = this.ticks.map((tick) => tick.getBoundingClientRect());
    this.ticks[1].hidden = at.left < low.right + 4 || at.right > high.left - 4;
  }

  // area: cells [row, column, last row, last column] on grid; or fractions [top, left, height, width]
  place({ cells, grid, fractions }) {
    const { width, height } = this.picture;
    const [top, left, high, wide] = fractions ?? [
      cells[0] / grid[0], cells[1] / grid[1],
      (cells[2] - cells[0] + 1) / grid[0], (cells[3] - cells[1] + 1) / grid[1]];
    return { x: left * width, y: top * height, width: wide * width, height: high * height };
  }
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e4 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

function percent(share) {
  return `${share >= 0.0995 ? (100 * share).toFixed(0) : (100 * share).toFixed(1)} %`;
}

function signed(value) {
  return `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(3)}`;
}
