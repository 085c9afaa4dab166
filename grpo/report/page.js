// The page holds its data, packed; figures are drawn when they come into view, in the page's colours.
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function decoded(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const letters = atob(base64); // in older browsers, which are slower
  return Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
}

async function unpacked(place) {
  const stream = new Blob([decoded(place.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never HTML: completions may hold anything
  return made;
}

function colored(layout) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), line = style.getPropertyValue("--line");
  const themed = { ...layout, font: { ...layout.font, color: ink } };
  for (const name of Object.keys(layout)) {
    if (/^[xy]axis\d*$/.test(name)) {
      themed[name] = { ...layout[name], gridcolor: line, linecolor: line, zerolinecolor: line };
    }
  }
  return themed;
}

const ready = (async () => {
  const content = JSON.parse(await unpacked(document.getElementById("content")));
  const drawn = new Set();
  let loaded;
  function plotly() {
    loaded ??= unpacked(document.getElementById("plotly")).then((code) => {
      const script = element("script");
      script.textContent = code;
      document.head.append(script);
    });
    return loaded;
  }
  async function draw(place) {
    await plotly();
    const figure = content.figures[place.dataset.figure];
    drawn.add(place);
    await Plotly.react(place, figure.data, colored(figure.layout), { displayModeBar: false, responsive: true });
  }
  const places = [...document.querySelectorAll(".plot")];
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
    }
  }, { rootMargin: "300px" });
  places.forEach((place) => watcher.observe(place));
  dark.addEventListener("change", () => drawn.forEach(draw));
  window.addEventListener("beforeprint", () => places.forEach(draw));
  return content;
})();
