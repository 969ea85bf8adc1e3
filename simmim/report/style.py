"""Style sheet of the HTML pages, for light and dark screens and for print."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #6b7280; --line: #e5e7eb;
  --paper: #fff; --card: #fafafa; --c0: #2563eb; --c1: #d97706; --c2: #6b7280; --c3: #059669; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --faint: #9ca3af; --line: #343a44;
  --paper: #15181d; --card: #1c2027; --c0: #60a5fa; --c1: #fbbf24; --c2: #9ca3af; --c3: #34d399; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; padding: 24px; max-width: 1180px; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2, summary { font-size: 18px; font-weight: 700; margin: 32px 0 8px; }
summary { cursor: pointer; }
.when { color: var(--faint); margin: 0 0 16px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: 16px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; color: var(--faint); font-size: 13px; }
.tiles b { display: block; color: var(--ink); font-size: 18px; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr));
  gap: 16px; }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--faint); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--line); stroke-width: 1; }
.s0 { --own: var(--c0); } .s1 { --own: var(--c1); }
.s2 { --own: var(--c2); } .s3 { --own: var(--c3); }
.line { fill: none; stroke: var(--own); stroke-width: 1.6; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 5 4; }
.band { fill: var(--own); opacity: .18; } .dot { fill: var(--own); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--faint); }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 14px; border-top: 2px solid var(--own);
  vertical-align: middle; margin-right: 5px; }
.legend .dashed i { border-top-style: dashed; }
img { max-width: 100%; border-radius: 8px; background: #fff; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  overflow-x: auto; font-size: 13px; line-height: 1.4; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 3px 18px 3px 0;
  vertical-align: top; font-weight: 400; } th { color: var(--faint); white-space: nowrap; }
td { overflow-wrap: anywhere; }
"""
