// Plotly draws for paper of one colour; this gives its figures the page's.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), line = style.getPropertyValue("--line");
  for (const figure of document.querySelectorAll(".js-plotly-plot")) {
    const change = { "font.color": ink };
    for (const name of Object.keys(figure._fullLayout)) {
      if (/^[xy]axis\d*$/.test(name)) {
        change[name + ".gridcolor"] = line;
        change[name + ".linecolor"] = line;
        change[name + ".zerolinecolor"] = line;
      }
    }
    Plotly.relayout(figure, change);
  }
}
dark.addEventListener("change", paint);
paint();
