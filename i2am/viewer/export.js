// The view as a picture file.

function drawView(scale) {
  const css = getComputedStyle(document.body), color = (name) => css.getPropertyValue(name).trim();
  const gap = 24, head = 76, caption = 64, foot = 44, size = 480;
  const widths = panels.map(({ picture }) => (size * picture.width) / Math.max(picture.width, picture.height));
  const heights = panels.map(({ picture }) => (size * picture.height) / Math.max(picture.width, picture.height));
  const canvas = make("canvas"), context = canvas.getContext("2d");
  // room for a score and what it is of, beside narrow pictures too
  const columns = widths.map((wide) => Math.max(wide, 280));
  const width = columns.reduce((sum, column) => sum + column + gap, gap);
  canvas.width = Math.round(scale * width);
  canvas.height = Math.round(scale * (head + caption + Math.max(...heights) + foot + 34));
  context.scale(scale, scale);
  context.fillStyle = color("--ground");
  context.fillRect(0, 0, canvas.width, canvas.height);
  const write = (text, x, y, { size = 13, ink = "--ink", weight = 400, align = "left", room = Infinity } = {}) => {
    context.font = `${weight} ${size}px ${css.fontFamily}`;
    context.fillStyle = color(ink);
    context.textAlign = align;
    while (context.measureText(text).width > room && text.length > 1) text = `${text.slice(0, -2)}\u2026`;
    context.fillText(text, x, y);
  };
  write(panels[0].sample.id, gap, 32, { size: 17, weight: 600, room: width - 2 * gap });
  write(reading.textContent, gap, 56, { ink: "--soft", room: width - 2 * gap });
  let left = gap;
  panels.forEach((panel, i) => {
    const wide = widths[i], column = columns[i], high = heights[i], top = head + caption, ratio = wide / panel.picture.width;
    write(panel.title, left, head + 14, { weight: 600, room: wide });
    write(panel.score.textContent.replace(/^IMACS/, "IMACS_"), left, head + 33, { size: 12, room: column });
    write(compared() ? `${panel.sample.id}: ${panel.subtitle.textContent}` : panel.subtitle.textContent,
      left, head + 52, { size: 12, ink: "--soft", room: column });
    context.drawImage(panel.canvas, left, top, wide, high);
    context.save();
    context.beginPath();
    context.rect(left, top, wide, high);
    context.clip();
    context.translate(left, top);
    for (const element of panel.marks.children) {
      if (element.style.display === "none") continue;
      const look = getComputedStyle(element), value = (name) => Number(element.getAttribute(name)) * ratio;
      context.strokeStyle = look.stroke;
      context.lineWidth = parseFloat(look.strokeWidth);
      context.setLineDash(look.strokeDasharray === "none" ? [] : look.strokeDasharray.split(/[ ,]+/).map(parseFloat));
      const path = new Path2D();
      if (element.tagName === "path") path.addPath(new Path2D(element.getAttribute("d")), new DOMMatrix().scale(ratio));
      else if (element.tagName === "rect") path.rect(value("x"), value("y"), value("width"), value("height"));
      else path.arc(value("cx"), value("cy"), value("r"), 0, 2 * Math.PI);
      context.stroke(path);
    }
    context.restore();
    if (!panel.scale.classList.contains("off")) {
      const bar = top + high + 10;
      context.drawImage(panel.scale.querySelector("canvas"), left, bar, wide, 8);
      context.globalAlpha = 0.75;
      context.fillStyle = color("--ground");
      context.fillRect(left, bar, wide * state.threshold, 8);
      context.globalAlpha = 1;
      const [low, at, highest] = panel.ticks.map((tick) => (tick.hidden ? "" : tick.textContent));
      const style = { size: 11, ink: "--soft" };
      write(low, left, bar + 22, style);
      write(at, left + wide * Math.min(Math.max(state.threshold, 0.2), 0.8), bar + 22, { ...style, align: "center" });
      write(highest, left + wide, bar + 22, { ...style, align: "right" });
    }
    left += column + gap;
  });
  const slice = sliceName(panels[0].sample) || "all steps, heads and layers";
  const range = state.range === "own" ? "each map its own range" : "one range for maps that are compared";
  write(`${slice}; values up to ${state.threshold.toFixed(2)} of the range are left out; ${range}`, gap,
    head + caption + Math.max(...heights) + foot + 14, { size: 11, ink: "--soft", room: width - 2 * gap });
  return canvas;
}

function saveView() {
  drawView(2).toBlob((blob) => {
    const address = URL.createObjectURL(blob);
    make("a", { href: address, download: `${panels[0].sample.id.replace(/[^\p{L}\p{N}._-]+/gu, "_").slice(0, 80)}.png` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }, "image/png");
}
