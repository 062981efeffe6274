// What a style sheet cannot do: details of a cell, switching the lens, and arrow keys.
(() => {
  const setUp = (root) => {
    root.classList.add("scripted");
    let lensRead = root.querySelector("[name=lens]")?.value; // undefined if there is one lens
    const rewriters = [];

    for (const section of root.querySelectorAll("[data-prompt]")) {
      const data = JSON.parse(section.querySelector("script[type='application/json']").textContent);
      const lens = () => Math.max(data.lenses.indexOf(lensRead), 0);
      const token = (index) => `<bdi>${data.tokens[index].replaceAll(" ", "<u> </u>")}</bdi>`;

      const found = (td) => {
        const rows = data.panels[td.closest("figure").dataset.matrix];
        return rows[td.parentNode.sectionRowIndex][td.cellIndex - 1];
      };
      const list = (title, entries) => {
        const items = [];
        for (let i = 0; i < entries.length; i += 2)
          items.push(`<li>${token(entries[i])} ${entries[i + 1]}</li>`);
        return `<div>${title}<ol>${items.join("")}</ol></div>`;
      };
      const described = (td) => {
        const head = td.closest("table").tHead.rows[0].cells[td.cellIndex];
        const at = `layer ${td.parentNode.cells[0].textContent}, ` +
          `${head.firstChild.outerHTML} at ${head.lastChild.textContent}`;
        const cell = found(td);
        if (typeof cell === "string") return `<p>${at}</p><div>${cell}</div>`;
        const [rank, faint, ...entries] = cell[2 + lens()], half = entries.length / 2;
        const facts = [at, `norm of δ_i ${cell[0]}`, `norm of x_i ${cell[1]}`];
        if (faint) facts.push("faint");
        if (rank !== null) facts.push(`target rank ${rank}`);
        return `<p>${facts.join(" · ")}</p>` + list("Highest scores", entries.slice(0, half)) +
          list("Lowest scores", entries.slice(half));
      };

      for (const figure of section.querySelectorAll("figure")) {
        const details = figure.querySelector(".details"), body = figure.querySelector("tbody");
        const hint = "Hover over a cell for its details, or move between cells with the arrow keys.";
        let focused = null;
        const show = (td) => {
          if (td) details.classList.add("used");
          details.innerHTML = td ? described(td) : `<p class="hint">${hint}</p>`;
        };
        const cellOf = (event) => event.target.closest("td");
        body.addEventListener("mouseover", (event) => show(cellOf(event) ?? focused));
        body.addEventListener("mouseleave", () => show(focused));
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
          const td = cellOf(event), row = td.parentNode, last = row.cells.length - 1;
          const to = {
            ArrowLeft: [row, td.cellIndex - 1],
            ArrowRight: [row, td.cellIndex + 1],
            ArrowUp: [row.previousElementSibling, td.cellIndex],
            ArrowDown: [row.nextElementSibling, td.cellIndex],
            Home: [row, 1],
            End: [row, last],
          }[event.key];
          if (!to || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
          event.preventDefault();
          event.stopPropagation(); // a notebook uses the same keys for its own cells
          if (to[1] >= 1) to[0]?.cells[to[1]]?.focus();
        });
        for (const td of body.querySelectorAll("td")) {
          td.tabIndex = -1;
          td.removeAttribute("title");
        }
        body.rows[0].lastElementChild.tabIndex = 0; // last layer, last token
        show(null);

        rewriters.push(() => {
          for (const td of body.querySelectorAll("td:not(.zero)")) {
            const [rank, faint, ...entries] = found(td)[2 + lens()];
            const lead = rank === 0 ? data.lead : "";
            td.querySelector(".top").innerHTML = lead + token(entries[0]);
            td.querySelector(".low").innerHTML = token(entries[entries.length / 2]);
            td.classList.toggle("lead", rank === 0);
            td.classList.toggle("faint", faint === 1);
          }
          show(focused);
        });
      }
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
