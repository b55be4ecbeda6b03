// Marks as CSV and JSON files, as vlsm.runs.marks reads them.
const markFiles = (() => {
  const COLUMNS = ["run_id", "image_id", "prompt", "mark", "time", "mask_digest"];
  const MARKS = ["accept", "redo", "reject"];
  const BLANK = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000\\u00ad\\u200b-\\u200f\\u202a-\\u202e\\u2060-\\u2069\\ufeff]";
  const FORMULA = new RegExp(`^'*(?:[\\t\\r\\n\\0]|${BLANK}*[=+\\-@\\uff1d\\uff0b\\uff0d\\uff20\\ufe66\\ufe62\\ufe63\\ufe6b\\u2212])`);
  // a spreadsheet takes no cell for a formula; vlsm.cells has the rule
  const writeCell = (text) => {
    const safe = FORMULA.test(text) ? `'${text}` : text;
    return /[",;\r\n]|^\s|\s$/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const readCell = (text) => (text.startsWith("'") && FORMULA.test(text) ? text.slice(1) : text);
  const asCsv = (rows) =>
    "\ufeff" +
    [COLUMNS, ...rows.map((row) => COLUMNS.map((name) => row[name]))]
      .map((cells) => `${cells.map(writeCell).join(",")}\r\n`)
      .join("");
  const asJson = (rows, run) =>
    `${JSON.stringify({ kind: "vlsm.marks", run_id: run, marks: rows.map(({ run_id, ...row }) => row) }, null, 1)}\n`;
  const parseCsv = (text) => {
    const table = [[""]];
    const cell = /"((?:[^"]|"")*)"|([^",\r\n]+)|(,)|(\r\n|\n|\r)/gy; // quoted, plain, next cell, next row
    let last = 0;
    for (const found of text.matchAll(cell)) {
      const row = table.at(-1);
      if (found[3]) row.push("");
      else if (found[4]) table.push([""]);
      else row[row.length - 1] += found[1]?.replaceAll('""', '"') ?? found[2];
      last = found.index + found[0].length;
    }
    if (last < text.length) throw new Error("a quote is not closed");
    const [head, ...body] = table.filter((row) => row.length > 1 || row[0]);
    return body.map((row) => Object.fromEntries(head.map((name, index) => [name, readCell(row[index] ?? "")])));
  };
  const parse = (text, run) => {
    const isJson = text.trimStart().startsWith("{");
    const tree = isJson ? JSON.parse(text) : null;
    const found = isJson ? tree.marks.map((row) => ({ run_id: tree.run_id, ...row })) : parseCsv(text);
    if (!found.length) throw new Error("it has no mark");
    for (const row of found) {
      if (row.run_id !== run) throw new Error("its marks are of another run");
      if (!isMark({ mark: row.mark, time: row.time || 0 }) || !row.image_id || typeof row.prompt !== "string")
        throw new Error("a row is no mark");
    }
    return found;
  };
  const isMark = (value) => MARKS.includes(value?.mark) && !Number.isNaN(Date.parse(value.time || 0));
  return { asCsv, asJson, parse, isMark };
})();
