/**
 * Plots as SVG: grouped bars and lines with markers. Colours are those of Okabe and Ito (2008), told
 * apart by the colour-blind too; lines differ in marker and dashes as well, bars in their order.
 */

export interface Series {
  readonly name: string;
  /** Bars: one value a group. Lines: [x, y]. */
  readonly points: readonly (readonly [number, number])[];
}

interface Plot {
  readonly title: string;
  readonly x: string;
  readonly y: string;
  /** Decades instead of steps; values must be above 0. */
  readonly logY?: boolean;
}

export interface LinePlot extends Plot {
  readonly series: readonly Series[];
  /** Powers of two, marked 1, 2, 4, ... */
  readonly log2X?: boolean;
}

export interface BarPlot extends Plot {
  readonly groups: readonly string[];
  readonly series: readonly { readonly name: string; readonly values: readonly number[] }[];
}

const COLOURS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#555555'];
const DASHES = ['', '7 3', '2 3', '9 3 2 3', '4 2', '1 2', '12 4'];
const WIDTH = 760;
const HEIGHT = 440;
const AREA = { left: 78, right: 20, top: 44, bottom: 92 };
const right = WIDTH - AREA.right;
const bottom = HEIGHT - AREA.bottom;

const escaped = (text: string): string =>
  text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');

function text(x: number, y: number, content: string, more = ''): string {
  return `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" ${more}>${escaped(content)}</text>`;
}

/** `1500` as `1.5k`, `2000000` as `2M`. */
export function shortNumber(value: number): string {
  for (const [unit, size] of [
    ['G', 1e9],
    ['M', 1e6],
    ['k', 1e3],
  ] as const) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))}${unit}`;
  }
  return `${Number(value.toPrecision(3))}`;
}

/** Round steps from 0 to at least `most`, about six of them; or the decades around the values. */
export function ticks(values: readonly number[], log: boolean): number[] {
  const most = Math.max(...values, log ? 1 : 0);
  if (log) {
    const positive = values.filter((value) => value > 0);
    const low = Math.floor(Math.log10(Math.min(...positive, most)));
    const high = Math.max(low + 1, Math.ceil(Math.log10(most)));
    return Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i));
  }
  const rough = (most || 1) / 6;
  const decade = 10 ** Math.floor(Math.log10(rough));
  const step = decade * ([1, 2, 2.5, 5, 10].find((factor) => factor * decade >= rough) ?? 10);
  const steps = Math.ceil((most || 1) / step - 1e-9);
  return Array.from({ length: steps + 1 }, (_, i) => i * step);
}

function frame(plot: Plot, marks: readonly number[], body: string[], names: string[]): string {
  const y = scaleY(marks, plot.logY ?? false);
  const grid = marks.map((mark) => {
    const at = y(mark);
    const line = `<line x1="${AREA.left}" y1="${at.toFixed(1)}" x2="${right}" y2="${at.toFixed(1)}" stroke="#ddd"/>`;
    return line + text(AREA.left - 8, at + 4, shortNumber(mark), 'text-anchor="end"');
  });
  const middle = (AREA.top + bottom) / 2;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" width="${WIDTH}" height="${HEIGHT}" font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12" fill="#222" role="img">`,
    `<title>${escaped(plot.title)}</title>`,
    '<rect width="100%" height="100%" fill="#fff"/>',
    text(AREA.left, 24, plot.title, 'font-size="15" font-weight="bold"'),
    ...grid,
    ...body,
    `<path d="M${AREA.left} ${AREA.top}V${bottom}H${right}" fill="none" stroke="#222"/>`,
    text((AREA.left + right) / 2, bottom + 40, plot.x, 'text-anchor="middle"'),
    text(18, middle, plot.y, `text-anchor="middle" transform="rotate(-90 18 ${middle})"`),
    ...names,
    '</svg>',
    '',
  ].join('\n');
}

function scaleY(marks: readonly number[], log: boolean): (value: number) => number {
  const of = (value: number): number => (log ? Math.log10(Math.max(value, marks[0] ?? 1)) : value);
  const low = of(marks[0] ?? 0);
  const high = of(marks.at(-1) ?? 1);
  return (value) => bottom - ((of(value) - low) / (high - low)) * (bottom - AREA.top);
}

/** Names side by side below the plot, in two rows if there are many. */
function legend(names: readonly string[], sign: (index: number, x: number, y: number) => string) {
  const perRow = names.length > 4 ? Math.ceil(names.length / 2) : names.length;
  const step = (right - AREA.left) / perRow;
  return names.map((name, index) => {
    const x = AREA.left + (index % perRow) * step;
    const y = HEIGHT - 30 + Math.floor(index / perRow) * 18;
    return sign(index, x, y) + text(x + 32, y + 4, name);
  });
}

const colour = (index: number): string => COLOURS[index % COLOURS.length] ?? '#000';

function marker(index: number, x: number, y: number): string {
  const fill = `fill="${colour(index)}"`;
  switch (index % 4) {
    case 0:
      return `<circle cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="4" ${fill}/>`;
    case 1:
      return `<rect x="${(x - 4).toFixed(1)}" y="${(y - 4).toFixed(1)}" width="8" height="8" ${fill}/>`;
    case 2:
      return `<path d="M${x.toFixed(1)} ${(y - 5).toFixed(1)}l5 9h-10z" ${fill}/>`;
    default:
      return `<path d="M${x.toFixed(1)} ${(y - 5).toFixed(1)}l5 5l-5 5l-5 -5z" ${fill}/>`;
  }
}

export function lineSvg(plot: LinePlot): string {
  const all = plot.series.flatMap((series) => series.points);
  const marks = ticks(
    all.map(([, y]) => y),
    plot.logY ?? false,
  );
  const xs = [...new Set(all.map(([x]) => x))].sort((a, b) => a - b);
  const first = xs[0] ?? 0;
  const of = (x: number): number => (plot.log2X ? Math.log2(x) : x);
  const xMarks = plot.log2X ? xs : ticks(xs, false);
  const low = plot.log2X ? of(first) : 0;
  const high = of(xMarks.at(-1) ?? 1);
  const room = right - AREA.left - 24;
  const x = (value: number): number => AREA.left + 12 + ((of(value) - low) / (high - low)) * room;
  const y = scaleY(marks, plot.logY ?? false);
  const stroke = (index: number): string =>
    `stroke="${colour(index)}" stroke-width="2" stroke-dasharray="${DASHES[index % DASHES.length]}"`;
  const body = [
    ...xMarks.map((mark) => text(x(mark), bottom + 18, shortNumber(mark), 'text-anchor="middle"')),
    ...plot.series.map(({ points }, index) => {
      const path = points.map(
        ([px, py], at) => `${at ? 'L' : 'M'}${x(px).toFixed(1)} ${y(py).toFixed(1)}`,
      );
      const dots =
        points.length > 40 ? '' : points.map(([px, py]) => marker(index, x(px), y(py))).join('');
      return `<path d="${path.join('')}" fill="none" ${stroke(index)}/>${dots}`;
    }),
  ];
  const names = legend(
    plot.series.map(({ name }) => name),
    (index, at, row) =>
      `<line x1="${at}" y1="${row}" x2="${at + 26}" y2="${row}" ${stroke(index)}/>${marker(index, at + 13, row)}`,
  );
  return frame(plot, marks, body, names);
}

/** Each bar bears its value. */
export function barSvg(plot: BarPlot): string {
  const marks = ticks(
    plot.series.flatMap((series) => series.values),
    plot.logY ?? false,
  );
  const y = scaleY(marks, plot.logY ?? false);
  const step = (right - AREA.left) / plot.groups.length;
  const width = (step * 0.8) / plot.series.length;
  const body = plot.groups.flatMap((group, at) => {
    const left = AREA.left + at * step + step * 0.1;
    const bars = plot.series.map(({ values }, index) => {
      const value = values[at] ?? 0;
      const x = left + index * width;
      const top = y(value);
      return (
        `<rect x="${x.toFixed(1)}" y="${top.toFixed(1)}" width="${(width - 2).toFixed(1)}" height="${Math.max(0, bottom - top).toFixed(1)}" fill="${colour(index)}"/>` +
        text(x + width / 2, top - 4, shortNumber(value), 'text-anchor="middle" font-size="10"')
      );
    });
    const lines = group.split('\n');
    return [
      ...bars,
      ...lines.map((line, row) =>
        text(
          left + step * 0.4,
          bottom + 16 + row * 13,
          line,
          'text-anchor="middle" font-size="11"',
        ),
      ),
    ];
  });
  const names = legend(
    plot.series.map(({ name }) => name),
    (index, at, row) =>
      `<rect x="${at}" y="${row - 6}" width="26" height="12" fill="${colour(index)}"/>`,
  );
  return frame(plot, marks, body, names);
}
