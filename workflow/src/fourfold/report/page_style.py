"""Style sheet of the report's HTML pages: light and dark, wide and narrow, screen and print."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --muted: #626b7a; --grid: #e2e5ea; --paper: #ffffff;
  --panel: #f6f7f9; --accent: #2f6fdd; --good: #1b7f5c; --bad: #b83a4f; --open: #8a5a00;
  --warn: #fff6e0; --warn-line: #e4b04a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --muted: #9aa3b2; --grid: #333a46; --paper: #14171d;
  --panel: #1c2028; --accent: #7aa7f5; --good: #52c49a; --bad: #ee7e90; --open: #e4b04a;
  --warn: #33290f; --warn-line: #8f6d22; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 1rem; margin: 0; font-weight: 600; color: var(--muted); letter-spacing: .02em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .75rem; }
p { margin: .5rem 0; }
.verdict { font-size: 1.7rem; line-height: 1.3; font-weight: 650; margin: .4rem 0 .6rem; letter-spacing: -.01em; }
.muted, .notes { color: var(--muted); font-size: .875rem; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .6rem .9rem; margin: .6rem 0;
  font-size: .925rem; border-radius: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tile { background: var(--panel); border-radius: 8px; padding: .85rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--muted); font-size: .85rem; line-height: 1.35; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--muted); border-bottom: 2px solid var(--grid);
  vertical-align: bottom; line-height: 1.3; min-width: 4.8rem; }
td { text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th, td { padding: .45rem .65rem; }
.name { text-align: left; font-weight: 600; }
tr.group td { border-top: 2px solid var(--grid); }
.best { color: var(--good); font-weight: 700; }
.pass { color: var(--good); font-weight: 700; } .fail { color: var(--bad); font-weight: 700; }
.undecided { color: var(--open); font-weight: 700; }
.banner { border-left: 4px solid; padding: .45rem .9rem; background: var(--panel); border-radius: 4px;
  font-size: .95rem; }
.gate th, .gate td { text-align: left; min-width: 0; }
.gate .engine { font-weight: 600; } .gate .basis { white-space: normal; color: var(--muted); font-size: .85rem; }
.facts th { text-align: left; width: 9rem; border-bottom: 1px solid var(--grid); vertical-align: top; }
.facts thead th { border-bottom: 2px solid var(--grid); color: var(--ink); }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; min-width: 11rem; }
figure { margin: 1.25rem 0 2.25rem; }
figure > div { overflow-x: auto; }
figure svg { width: 100%; min-width: 36rem; height: auto; display: block; }
figcaption { color: var(--muted); font-size: .875rem; margin-top: .5rem; }
.sample { border: 1px solid var(--grid); border-radius: 8px; padding: .9rem 1rem; margin: 1rem 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .9rem;
  margin-top: .75rem; }
.answer { background: var(--panel); border-radius: 6px; padding: .7rem .8rem; min-width: 0; }
.answer pre { white-space: pre-wrap; overflow-wrap: anywhere; font-family: inherit; font-size: .85rem;
  max-height: 18rem; overflow-y: auto; margin: .4rem 0 0; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; color: var(--muted); font-size: .925rem; }
@media print { body { max-width: none; padding: 0; } .answer pre { max-height: none; } }
"""
