{
  // A click or Enter on a picture shows it large, with what its row and its caption say.
  const dialog = document.querySelector("dialog.large");
  const large = dialog.querySelector("img"), about = dialog.querySelector(".about");
  const visible = () => [...document.querySelectorAll("button.picture")].filter((button) => button.offsetParent);
  let pictures = [], place = 0;

  function show(next) {
    place = (next + pictures.length) % pictures.length;
    const button = pictures[place], small = button.querySelector("img");
    large.className = small.className;
    large.alt = small.alt;
    // The file beside the page is sharper than what the page holds; a page that was moved has only the latter.
    large.onerror = () => { large.onerror = null; large.src = small.src; };
    large.src = button.dataset.file || small.src;
    const parts = [button.closest(".row")?.querySelector(".title"), button.closest("figure")?.querySelector("figcaption")];
    about.replaceChildren(...parts.filter(Boolean).map((part) => {
      const copy = document.createElement("div");
      copy.append(...part.cloneNode(true).childNodes);
      return copy;
    }));
  }

  function step(by) { show(place + by); }

  function close() {
    dialog.close();
    pictures[place].focus();  // the browser would return to the picture that was opened first
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button.picture");
    if (!button) return;
    pictures = visible();
    show(pictures.indexOf(button));
    dialog.showModal();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target.matches("[data-step]")) step(Number(event.target.dataset.step));
    else if (event.target === dialog || event.target.matches("[data-close]")) close();
  });
  dialog.addEventListener("keydown", (event) => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by) { event.preventDefault(); step(by); }
  });
  dialog.addEventListener("cancel", (event) => { event.preventDefault(); close(); });
}
