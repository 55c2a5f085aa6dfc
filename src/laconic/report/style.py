"""The style sheet of the report: light, dark and print."""

__all__ = ["DARK", "LIGHT", "SERIES", "STYLE"]

# Every text reaches a contrast of 4.5 on what it stands on, every drawing 3 on the page; the
# five parts of a file differ in hue and in lightness for every kind of colour vision.
LIGHT: dict[str, str] = {
    "paper": "#ffffff",
    "panel": "#f5f7f9",
    "ink": "#171b20",
    "soft": "#56606b",
    "rule": "#d9dfe5",
    "accent": "#0063a5",
    "past": "#7d8894",
    "shade": "#171b2026",
    "codes": "#0072b2",
    "on-codes": "#ffffff",
    "positions": "#dd7a00",
    "on-positions": "#14181d",
    "tables": "#00a078",
    "on-tables": "#14181d",
    "dense": "#84919f",
    "on-dense": "#0c0f12",
    "header": "#6a3d78",
    "on-header": "#ffffff",
}
DARK: dict[str, str] = {
    "paper": "#0f1419",
    "panel": "#171d24",
    "ink": "#e6ebf0",
    "soft": "#9eabb8",
    "rule": "#2c353f",
    "accent": "#5cb3f2",
    "past": "#8794a1",
    "shade": "#000000a6",
    "codes": "#3d9be0",
    "on-codes": "#0b0f13",
    "positions": "#f0a030",
    "on-positions": "#0b0f13",
    "tables": "#35c39b",
    "on-tables": "#0b0f13",
    "dense": "#7a8794",
    "on-dense": "#0b0f13",
    "header": "#cfb0ea",
    "on-header": "#0b0f13",
}


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


# What tells the series of a drawing apart, in order.
SERIES = ("codes", "positions", "tables", "header", "dense")


def _series() -> str:
    return "".join(
        f".series-{place}{{fill:var(--{name});stroke:var(--{name});background:var(--{name})}}\n"
        for place, name in enumerate(SERIES)
    )


def _parts() -> str:
    fields = {
        "code_bytes": "codes",
        "index_bytes": "positions",
        "table_bytes": "tables",
        "dense_bytes": "dense",
        "header_bytes": "header",
    }
    return "".join(
        f".{field}{{fill:var(--{name});background:var(--{name})}}"
        f".on-{field}{{fill:var(--on-{name})}}\n"
        for field, name in fields.items()
    )


_RULES = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
 font:15px/1.5 -apple-system,BlinkMacSystemFont,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",
 Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1240px;margin:0 auto;padding:44px 28px 72px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:0 0 10px;font-weight:650;
 overflow-wrap:anywhere}
h2{font-size:19px;line-height:1.3;letter-spacing:-.01em;margin:0 0 4px;font-weight:650}
p{margin:0}
.kicker{color:var(--soft);font-size:13px;margin-bottom:14px}
.lead{font-size:17px;line-height:1.5;max-width:46em}
.chain{display:flex;flex-wrap:wrap;gap:6px 4px;list-style:none;margin:18px 0 0;padding:0;
 font-size:13px}
.chain li{display:flex;align-items:center;gap:4px}
.chain li span{border:1px solid var(--rule);border-radius:99px;padding:2px 11px}
.chain li:not(:last-child)::after{content:"→";color:var(--soft)}
section{margin-top:48px}
.note{color:var(--soft);font-size:13.5px;max-width:64em;margin-bottom:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(205px,1fr));gap:12px;
 margin:28px 0 0}
.tiles div{background:var(--panel);border-radius:10px;padding:14px 18px 15px}
.tiles dt{color:var(--soft);font-size:13px}
.tiles dd{margin:0}
.tiles .change{font-size:21px;line-height:1.35;font-weight:600;letter-spacing:-.01em;margin-top:3px}
.tiles .change span{white-space:nowrap}
.tiles .change .from{color:var(--soft);font-weight:400}
.tiles .detail{font-size:13px;color:var(--soft)}
.scroll{overflow-x:auto;max-width:100%;
 background:linear-gradient(90deg,var(--paper) 50%,transparent) local,
 linear-gradient(270deg,var(--paper) 50%,transparent) 100% 0 local,
 linear-gradient(90deg,var(--shade),transparent) scroll,
 linear-gradient(270deg,var(--shade),transparent) 100% 0 scroll;
 background-size:36px 100%,36px 100%,12px 100%,12px 100%;background-repeat:no-repeat}
.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;font-size:13px;line-height:1.35;min-width:100%}
th,td{padding:6px 7px;text-align:right;white-space:nowrap;font-weight:400;vertical-align:baseline}
th.word,td.word{text-align:left}
thead th{color:var(--soft);font-size:12px;vertical-align:bottom;padding-top:2px;padding-bottom:4px}
thead th.group{color:var(--ink);text-align:center;padding-bottom:3px}
thead th.group::after{content:"";display:block;border-bottom:1px solid var(--rule);margin-top:3px}
thead tr:last-child th,thead tr:last-child td,thead [rowspan]{border-bottom:1px solid var(--past)}
tbody tr+tr th,tbody tr+tr td{border-top:1px solid var(--rule)}
.open{padding-left:17px}
tbody th.open,thead tr:first-child th:first-child{padding-left:0}
tbody th{position:sticky;left:0;background:var(--paper);z-index:1}
tr.sum th,tr.sum td{font-weight:600}
tbody tr.sum:first-child th,tbody tr.rest+tr.sum th{background:var(--paper)}
tr.rest th,tr.rest td{color:var(--soft)}
td.bar{width:9%;min-width:64px;padding-left:2px;padding-top:10px;vertical-align:top}
table wbr{display:none}
.layers tbody th{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;
 font-size:12px}
.layers tr.sum th,.layers tr.rest th{font-family:inherit;font-size:inherit}
.pair{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:48px 44px;margin-top:48px}
.pair section:first-child,.single section,.pair.inner{margin-top:0}
.single{margin-top:48px}
svg{display:block}
svg text{font-size:12px;fill:var(--ink);font-family:inherit}
svg .tick,svg .axis{fill:var(--soft)}
.tradeoff{width:100%;max-width:620px;height:auto}
.narrow{display:none}
.grid{stroke:var(--rule);stroke-width:1}
.base{stroke:var(--past);stroke-width:1;vector-effect:non-scaling-stroke}
.path{fill:none;stroke:var(--past);stroke-width:1.5;stroke-linejoin:round}
.leader{stroke:var(--past);stroke-width:1}
.dot{fill:var(--accent);stroke:var(--paper);stroke-width:1.5}
.dot.first{fill:var(--paper);stroke:var(--accent);stroke-width:2}
.reference{stroke:var(--past);stroke-width:1.5;stroke-dasharray:4 3}
.whisker{stroke-width:1.5}
.cell{fill:var(--accent);stroke:none;shape-rendering:crispEdges}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:24px 32px;
 list-style:none;margin:0 0 14px;padding:0}
.panels li{break-inside:avoid;min-width:0;max-width:360px}
.panels svg{width:100%;height:auto}
.panels .name{font-weight:600;overflow-wrap:anywhere}
.panels .range{color:var(--soft);font-size:13px}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;margin:0 0 14px;padding:0;
 font-size:13px}
.legend li{display:flex;align-items:center;gap:6px}
.legend i{width:12px;height:12px;border-radius:3px;display:block}
.legend .line{height:0;border-radius:0;background:none;border-top:2px solid var(--accent)}
.legend .area{background:var(--past);opacity:.45}
.bytes{list-style:none;margin:0;padding:0;font-size:13px}
.bytes li{display:grid;grid-template-columns:minmax(5.5em,auto) 1fr;gap:2px 12px;padding:5px 0 6px;
 align-items:center;border-top:1px solid var(--rule)}
.bytes li:first-child{border-top:0;padding-top:0}
.bytes .size{text-align:right;white-space:nowrap}
.bytes .step{overflow-wrap:anywhere}
.bytes svg{grid-column:1/-1;width:100%}
svg.bar{border-radius:3px;overflow:hidden}
svg.bar rect{stroke:var(--paper);stroke-width:0}
.empty{fill:var(--rule);opacity:.6}
.filled{fill:var(--accent)}
.multiples{display:grid;grid-template-columns:repeat(auto-fill,minmax(168px,1fr));gap:20px 24px;
 list-style:none;margin:0;padding:0}
.multiples li{break-inside:avoid;min-width:0}
.multiples svg{width:100%;height:72px}
.multiples .name{font:12px/1.35 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",
 monospace;overflow-wrap:anywhere;margin-bottom:4px}
.multiples .range{display:flex;justify-content:space-between;color:var(--soft);font-size:11.5px}
.histogram path,.curve path,.curve line{vector-effect:non-scaling-stroke}
.histogram .before{fill:var(--past);fill-opacity:.4;stroke:none}
.histogram .after{fill:none;stroke:var(--accent);stroke-width:1.5}
.losses{fill:none;stroke:var(--accent);stroke-width:1.5;stroke-linejoin:round}
pre{margin:0;background:var(--panel);border-radius:10px;padding:14px 18px;overflow-x:auto;
 font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.conditions{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:5px 18px;margin:0;
 font-size:13.5px;align-content:start}
.conditions dt{color:var(--soft)}
.conditions dd{margin:0;overflow-wrap:anywhere}
.notes{margin:0 0 16px;padding:12px 18px 12px 34px;background:var(--panel);border-radius:10px;
 border-left:3px solid var(--positions)}
details{margin-top:12px;font-size:13px}
summary{cursor:pointer;color:var(--accent)}
@media screen and (max-width:1040px){.pair{grid-template-columns:minmax(0,1fr)}}
@media screen and (max-width:940px){.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media screen and (max-width:620px){
 main{padding:26px 16px 48px}
 h1{font-size:27px}
 .lead{font-size:16px}
 section,.pair{margin-top:38px}
 .pair{gap:38px}
 .wide{display:none}
 .narrow{display:block;max-width:460px}
 .tiles{grid-template-columns:minmax(0,1fr)}
 table wbr{display:inline}
 .layers tbody th{min-width:38vw;max-width:46vw;white-space:normal;overflow-wrap:anywhere}
 .multiples{grid-template-columns:repeat(auto-fill,minmax(136px,1fr));gap:18px 16px}
 .conditions{grid-template-columns:minmax(0,1fr);gap:0}
 .conditions dd{margin-bottom:8px}
}
@page{size:A4 landscape;margin:12mm}
@media print{
 *{-webkit-print-color-adjust:exact;print-color-adjust:exact}
 body{font-size:10pt}
 main{max-width:none;padding:0}
 h2,.note,.legend{break-after:avoid}
 section,.pair,.single{margin-top:9mm}
 .pair{gap:8mm 10mm}
 .lead{font-size:11.5pt}
 h1{font-size:22pt}
 .tiles{margin-top:6mm}
 .scroll{background:none}
 .scroll{overflow:visible}
 table{font-size:8pt}
 thead{display:table-header-group}
 thead th{font-size:7.5pt}
 th,td{padding:1mm 1.2mm}
 .open{padding-left:2.6mm}
 td.bar{padding-top:1.3mm}
 table wbr{display:inline}
 tbody th{position:static;white-space:normal;overflow-wrap:anywhere}
 .pair section,pre{break-inside:avoid}
 tr,.tiles div,.bytes li,svg{break-inside:avoid}
 pre{white-space:pre-wrap;overflow:visible}
 details{display:none}
}
"""

STYLE = (
    f":root{{{_variables(LIGHT)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}\n"
    f"{_parts()}{_series()}{_RULES}"
)
