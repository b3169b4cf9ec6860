"use strict";
// Curves and spectra, drawn by uPlot, and redrawn when the colours or the width change.
(() => {
  const plots = [];
  const number = value => value == null ? "–" :
    Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));

  function axes(colours, log) {
    const font = "12px " + getComputedStyle(document.body).fontFamily;
    const common = { stroke: colours.soft, grid: { stroke: colours.line, width: 1 }, ticks: { stroke: colours.line, width: 1, size: 5 }, font };
    const short = value => value == null ? "" : value >= 1e6 ? value / 1e6 + "M" : value >= 1e4 ? value / 1e3 + "k" : String(value);
    return [
      { ...common, values: (_, ticks) => ticks.map(short), size: 30 },
      { ...common, size: 62, grid: { ...common.grid, filter: (_, ticks) => ticks.map(v => log && Math.abs(Math.log10(v) % 1) > 1e-9 ? null : v) }, values: (_, ticks) => ticks.map(v => v == null ? "" : log ? v.toExponential(0) : number(v)) },
    ];
  }

  function mark(x, colour) {
    return { hooks: { draw: [u => {
      const at = Math.round(u.valToPos(x, "x", true)), { top, height } = u.bbox;
      u.ctx.save();
      u.ctx.strokeStyle = colour; u.ctx.lineWidth = devicePixelRatio * 1.5; u.ctx.setLineDash([6 * devicePixelRatio, 4 * devicePixelRatio]);
      u.ctx.beginPath(); u.ctx.moveTo(at, top); u.ctx.lineTo(at, top + height); u.ctx.stroke();
      u.ctx.restore();
    }] } };
  }

  function draw(figure, chart) {
    const box = figure.querySelector(".plot");
    const colours = { soft: theme.colour("soft"), line: theme.colour("line") };
    const few = chart.x.length < 40;
    const options = {
      width: Math.max(200, box.clientWidth), height: 212,
      axes: axes(colours, chart.log),
      scales: { x: { time: false }, y: chart.log ? { distr: 3 } : { range: (_, low, high) => {
        const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
        return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
      } } },
      cursor: { y: false, points: { size: 7 } },
      legend: { live: true, markers: { fill: (u, i) => u.series[i].stroke() } },
      hooks: { ready: [u => {
        // Without a pointer the legend shows the last values instead of dashes.
        const end = () => u.setLegend({ idx: chart.x.length - 1 });
        u.over.addEventListener("mouseleave", () => setTimeout(end));
        end();
      }] },
      plugins: chart.mark == null ? [] : [mark(chart.mark, theme.colour("series-1"))],
      series: [
        { label: chart.unit ?? "step", value: (_, v) => v == null ? "–" : v.toLocaleString("en") },
        ...chart.curves.map((curve, i) => ({
          label: curve.name, stroke: theme.colour(`series-${i % 4}`), width: 1.75, spanGaps: true,
          points: { show: few, size: 5 }, value: (_, v) => number(v),
        })),
      ],
    };
    box.replaceChildren();
    return new uPlot(options, [chart.x, ...chart.curves.map(curve => curve.values)], box);
  }

  function add(figure, chart) {
    if (!figure || !chart) return;
    const entry = { figure, chart, width: 0 };
    plots.push(entry);
  }

  const redraw = always => plots.forEach(entry => {
    const width = entry.figure.clientWidth;
    if (width === 0) return; // folded
    if (always || width !== entry.width) { entry.width = width; entry.plot?.destroy(); entry.plot = draw(entry.figure, entry.chart); }
  });

  data.charts.forEach((chart, i) => add(document.querySelector(`[data-chart="${i}"]`), chart));
  data.spectra.forEach((spectrum, i) => {
    // Shares below 1e-12 are rounding: on a log scale they would look like a cliff.
    const values = spectrum.shares.map(v => v > 1e-12 ? v : null);
    add(document.querySelector(`[data-spectrum="${i}"]`), {
      x: values.map((_, rank) => rank + 1), curves: [{ name: "share of variance", values }],
      log: values.some(v => v !== null), mark: spectrum.rank, unit: "direction",
    });
  });
  redraw(true);
  theme.onChange(() => redraw(true));
  new ResizeObserver(() => redraw(false)).observe(document.querySelector("main"));
  document.querySelector("#curves details")?.addEventListener("toggle", () => redraw(false));
})();
