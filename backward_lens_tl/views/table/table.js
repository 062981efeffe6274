// What a style sheet cannot do: details of a cell, early tokens of a long prompt, switching the
// lens, and arrow keys.
(() => {
  const CHUNK = 25; // columns that are written at once

  const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer;
  const half = (bits) => {
    const exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : fraction * 2 ** -24);
  };
  const rounded = (value, digits) =>
    Number.isFinite(value) ? String(Number(value.toPrecision(digits))) :
      { Infinity: "inf", "-Infinity": "-inf" }[value] ?? "nan";

  // The arrays of a matrix, and of what each lens reads in it.
  const unpacked = (panel, data) => {
    const isWide = data.tokens.length > 0x10000;
    const lenses = panel.lenses.map((lens) => ({
      ...lens,
      tokens: new (isWide ? Uint32Array : Uint16Array)(bytes(lens.tokens)),
      scores: new Uint16Array(bytes(lens.scores)),
      ranks: new Int32Array(bytes(lens.ranks)),
      often: lens.often.map((tokens) => new Set(tokens)),
    }));
    return { ...panel, norms: new Float32Array(bytes(panel.norms)), lenses };
  };

  const setUp = (root) => {
    root.classList.add("scripted");
    let lensRead = root.querySelector("[name=lens]")?.value; // undefined if there is one lens
    const rewriters = [];

    const setUpFigure = (figure, data, panel) => {
      const details = figure.querySelector(".details"), body = figure.querySelector("tbody");
      const scroll = figure.querySelector(".scroll"), heads = figure.querySelector("thead tr").cells;
      const columns = heads.length - 1;
      const read = () => panel.lenses[Math.max(data.lenses.indexOf(lensRead), 0)];
      const token = (index) => `<bdi>${data.tokens[index].replaceAll(" ", "<u> </u>")}</bdi>`;

      // --- cells: `at` is the place of a cell in the table, row by row ---
      const isZero = (at) => panel.zero[at] !== "-";
      const reason = (at) => panel.reasons[panel.zero[at]];
      const content = (at) => {
        const lens = read(), first = at * lens.n, top = lens.tokens[first];
        const low = lens.tokens[first + lens.n / 2];
        const often = (end, index) => (lens.often[end].has(index) ? " often" : "");
        return `<div class="top${often(0, top)}">${lens.ranks[at] ? "" : data.lead}${token(top)}` +
          `</div><div class="low${often(1, low)}">${token(low)}</div>`;
      };
      const classes = (at) => {
        const lens = read();
        return (lens.ranks[at] ? "" : " lead") + (lens.faint[at] === "1" ? " faint" : "");
      };
      const written = (at) => {
        const answer = heads[(at % columns) + 1].classList.contains("answer") ? " answer" : "";
        if (isZero(at))
          return `<td class="zero${answer}" tabindex="-1"><span aria-hidden="true">·</span>` +
            `<span class="sr">${reason(at)}</span></td>`;
        const shades = [...panel.shades.slice(4 * at, 4 * at + 4)];
        const shade = shades.map((digit, index) => "nmpq"[index] + digit).join(" ");
        return `<td class="${shade}${classes(at)}${answer}" tabindex="-1">${content(at)}</td>`;
      };

      // --- early tokens: a gap holds the place of cells that are not written yet ---
      const columnOf = (td) => {
        let column = 0;
        for (let at = td; (at = at.previousElementSibling).tagName === "TD"; ) column += at.colSpan;
        return column;
      };
      const placeOf = (td) => td.parentNode.sectionRowIndex * columns + columnOf(td);
      const isGap = (td) => td.classList.contains("early");
      let gaps = []; // first and last column
      const fill = ([first, last]) => {
        gaps = gaps.filter((gap) => gap[0] !== first);
        for (const row of body.rows) {
          let td = row.cells[1], column = 0;
          for (; column < first; td = td.nextElementSibling) column += td.colSpan;
          const start = row.sectionRowIndex * columns;
          let cells = "";
          for (let at = start + first; at < start + last; at++) cells += written(at);
          td.outerHTML = cells;
        }
      };
      const fillVisible = () => {
        const first = heads[0].offsetWidth, width = heads[columns].offsetWidth;
        const left = scroll.scrollLeft - scroll.clientWidth / 2;
        const right = scroll.scrollLeft + scroll.clientWidth * 1.5;
        for (const gap of gaps)
          if (first + gap[0] * width < right && first + gap[1] * width > left) fill(gap);
      };
      const fillAll = () => gaps.forEach(fill);
      const cellAt = (row, column) => {
        const gap = gaps.find(([first, last]) => first <= column && column < last);
        if (gap) fill(gap);
        let td = row.cells[1];
        for (let at = 0; at < column; td = td.nextElementSibling) at += td.colSpan;
        return td;
      };
      const early = body.querySelector("td.early")?.colSpan ?? 0;
      if (early) {
        // From the last gap, which is full, to the first one, which takes what is left.
        for (let last = early; last > 0; last -= CHUNK)
          gaps.unshift([Math.max(last - CHUNK, 0), last]);
        const split = gaps.map(
          ([first, last]) => `<td class="early" colspan="${last - first}"></td>`).join("");
        for (const row of body.rows) row.cells[1].outerHTML = split;
        scroll.addEventListener("scroll", fillVisible, { passive: true });
        addEventListener("resize", fillVisible);
        addEventListener("beforeprint", fillAll);
      }

      // --- details ---
      const list = (title, first, last) => {
        const lens = read(), items = [];
        for (let i = first; i < last; i++)
          items.push(`<li>${token(lens.tokens[i])} ` +
            `${rounded(half(lens.scores[i]) * lens.scale, 3)}</li>`);
        return `<div>${title}<ol>${items.join("")}</ol></div>`;
      };
      const described = (td) => {
        const head = heads[columnOf(td) + 1], at = placeOf(td), lens = read();
        const place = `layer ${td.parentNode.cells[0].textContent}, ` +
          `${head.querySelector("bdi").outerHTML} at ${head.querySelector("small").textContent}`;
        if (isZero(at)) return `<p>${place}</p><div>${reason(at)}</div>`;
        const norms = [...panel.norms.subarray(3 * at, 3 * at + 3)].map((x) => rounded(x, 4));
        const facts = [place, ...["‖δ_i‖", "‖x_i‖", "‖x_i‖·‖δ_i‖"].map((of, i) => `${of} ${norms[i]}`)];
        if (lens.faint[at] === "1") facts.push("faint");
        const says = head.querySelector(".says")?.innerHTML;
        if (lens.ranks[at] >= 0)
          facts.push(`${says ? `should say ${says}, ` : "target "}rank ${lens.ranks[at]}`);
        const first = at * lens.n, half = first + lens.n / 2;
        return `<p>${facts.join(" · ")}</p>` + list("Highest scores", first, half) +
          list("Lowest scores", half, first + lens.n);
      };
      const hint = "Hover over a cell for its details, or move between cells with the arrow keys.";
      let focused = null;
      const show = (td) => {
        if (td) details.classList.add("used");
        details.innerHTML = td ? described(td) : `<p class="hint">${hint}</p>`;
      };
      const cellOf = (event) => event.target.closest("td:not(.early)");
      body.addEventListener("mouseover", (event) => show(cellOf(event) ?? focused));
      body.addEventListener("mouseleave", () => show(focused));

      // --- keys ---
      body.addEventListener("focusin", (event) => {
        const td = cellOf(event);
        // Tab reaches one cell, and the arrow keys the others from there.
        body.querySelector("td[tabindex='0']").tabIndex = -1;
        td.tabIndex = 0;
        // A browser would leave a cell that is half covered by a header.
        td.scrollIntoView({ block: "nearest", inline: "nearest" });
        show((focused = td));
      });
      body.addEventListener("keydown", (event) => {
        const td = cellOf(event), row = td.parentNode, column = columnOf(td);
        const to = {
          ArrowLeft: [row, column - 1],
          ArrowRight: [row, column + 1],
          ArrowUp: [row.previousElementSibling, column],
          ArrowDown: [row.nextElementSibling, column],
          Home: [row, 0],
          End: [row, columns - 1],
        }[event.key];
        if (!to || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        event.stopPropagation(); // a notebook uses the same keys for its own cells
        if (to[0] && 0 <= to[1] && to[1] < columns) cellAt(...to).focus();
      });
      for (const td of body.querySelectorAll("td:not(.early)")) {
        td.tabIndex = -1;
        td.removeAttribute("title");
      }
      body.rows[0].lastElementChild.tabIndex = 0; // last layer, last token
      show(null);

      rewriters.push(() => {
        for (const row of body.rows) {
          let at = row.sectionRowIndex * columns;
          for (const td of [...row.cells].slice(1)) {
            if (!isGap(td) && !isZero(at)) {
              td.innerHTML = content(at);
              td.classList.remove("lead", "faint");
              td.className += classes(at);
            }
            at += td.colSpan;
          }
        }
        show(focused);
      });
    };

    for (const section of root.querySelectorAll("[data-prompt]")) {
      const data = JSON.parse(section.querySelector("script[type='application/json']").textContent);
      for (const figure of section.querySelectorAll("figure"))
        setUpFigure(figure, data, unpacked(data.panels[figure.dataset.matrix], data));
    }
    const follow = () => {
      const lens = root.querySelector("[name=lens]:checked")?.value;
      if (lens === lensRead) return;
      lensRead = lens;
      for (const about of root.querySelectorAll("[data-lens]"))
        about.hidden = about.dataset.lens !== lens;
      for (const rewrite of rewriters) rewrite();
    };
    root.addEventListener("change", follow);
    follow();
    // Scroll to the last token, where the loss is.
    for (const scroll of root.querySelectorAll(".scroll")) scroll.scrollLeft = scroll.scrollWidth;
  };
  for (const root of document.querySelectorAll(".blt:not(.scripted)")) setUp(root);
  // After going back to a page, browsers may restore the controls without any event.
  addEventListener("pageshow", () => {
    for (const root of document.querySelectorAll(".blt")) root.dispatchEvent(new Event("change"));
  });
})();
