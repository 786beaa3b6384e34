// Drawings on a canvas, in the page's own colours, sharp on every screen.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A cleared context with its width and height in CSS pixels. */
function begin(canvas, height) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = "11px system-ui, sans-serif";
  return { context, width, height };
}

function axis(context, width, y, label) {
  context.strokeStyle = colour("line");
  context.beginPath();
  context.moveTo(0, y + 0.5);
  context.lineTo(width, y + 0.5);
  context.stroke();
  context.fillStyle = colour("faint");
  context.fillText(label, 2, y - 4);
}

/** Bars of the last steps: decode below, prefill above it; the scale fits the tallest, the budget is a dashed line. */
export function drawSteps(canvas, steps, budget) {
  const { context, width, height } = begin(canvas, 150);
  const barWidth = 5;
  const shown = steps.slice(-Math.floor(width / (barWidth + 1)));
  const totals = shown.map((step) => step.num_decode_tokens + step.num_prefill_tokens);
  const top = niceTop(Math.max(4, ...totals));
  const toY = (value) => height - 4 - (value / top) * (height - 22);
  axis(context, width, toY(top), top.toLocaleString("en"));
  axis(context, width, toY(0), "");
  shown.forEach((step, i) => {
    const x = width - (shown.length - i) * (barWidth + 1);
    const middle = toY(step.num_decode_tokens);
    context.fillStyle = colour("decode");
    context.fillRect(x, middle, barWidth, toY(0) - middle);
    context.fillStyle = colour("prefill");
    const end = toY(step.num_decode_tokens + step.num_prefill_tokens);
    context.fillRect(x, end, barWidth, middle - end);
  });
  if (budget <= top) {
    context.strokeStyle = colour("warn");
    context.setLineDash([4, 4]);
    context.beginPath();
    context.moveTo(0, toY(budget));
    context.lineTo(width, toY(budget));
    context.stroke();
  }
}

/** Lines over time; `points` are {at, values}, oldest first, and the right edge is `now`. */
export function drawRates(canvas, points, now, span, names) {
  const { context, width, height } = begin(canvas, 150);
  const top = niceTop(Math.max(10, ...points.flatMap((point) => point.values)));
  const toX = (at) => width - ((now - at) / span) * width;
  const toY = (value) => height - 4 - (value / top) * (height - 22);
  axis(context, width, toY(top), top.toLocaleString("en"));
  axis(context, width, toY(0), "");
  names.forEach((name, k) => {
    if (!points.length) return;
    context.strokeStyle = colour(name);
    context.lineWidth = 2;
    context.lineJoin = "round";
    context.beginPath();
    points.forEach((point, i) => context[i ? "lineTo" : "moveTo"](toX(point.at), toY(point.values[k])));
    context.stroke();
    context.lineTo(toX(points.at(-1).at), toY(0));
    context.lineTo(toX(points[0].at), toY(0));
    context.globalAlpha = 0.12;
    context.fillStyle = colour(name);
    context.fill();
    context.globalAlpha = 1;
  });
}

/** One square for each block, in the order of their ids. */
export function drawBlocks(canvas, blocks) {
  const height = 150;
  const { context, width } = begin(canvas, height);
  let size = 16;
  while (size > 2 && Math.floor(width / size) * Math.floor(height / size) < blocks.length) size -= 1;
  const perRow = Math.floor(width / size);
  const colours = [colour("free"), colour("cached"), colour("used"), colour("shared")];
  const gap = size > 4 ? 1.5 : size > 2 ? 1 : 0;
  for (let i = 0; i < blocks.length; i += 1) {
    context.fillStyle = colours[Number(blocks[i])];
    context.fillRect((i % perRow) * size, Math.floor(i / perRow) * size, size - gap, size - gap);
  }
}

/** The next round number. */
function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((top) => top >= value);
}
