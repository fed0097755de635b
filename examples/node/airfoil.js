// The regression itself: its data, loss and gradient. The data is the airfoil file prepared as in the book, or made-up
// rows of the same form (5 features and a label). The flat vector v is w (5) and b (1). Nothing here uses a server.
const fs = require('node:fs');

const EXAMPLES = 1500;

function normal() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

function madeUp() {
  const x = Array.from({ length: 5 }, normal);
  return [...x, x[0] - x[1] / 2 + 0.7 * normal()];
}

function read(file) {
  const rows = fs.readFileSync(file, 'ascii').trim().split(/\r?\n/).map((line) => line.split('\t').map(Number));
  const fits = (row) => row.length === 6 && row.every(Number.isFinite);
  if (!rows.every(fits)) throw new Error(`${file}: expected 6 columns of numbers, separated by tabs`);
  return rows;
}

// Standardizes every column, including the label, over all rows; then takes the first 1500 rows.
function examples(file) {
  const rows = file ? read(file) : Array.from({ length: EXAMPLES + 3 }, madeUp);
  for (let j = 0; j < 6; j += 1) {
    const mean = rows.reduce((sum, row) => sum + row[j], 0) / rows.length;
    const spread = Math.sqrt(rows.reduce((sum, row) => sum + (row[j] - mean) ** 2, 0) / rows.length);
    rows.forEach((row) => { row[j] = (row[j] - mean) / spread; });
  }
  return rows.slice(0, EXAMPLES);
}

function shuffle(rows) {
  for (let i = rows.length - 1; i > 0; i -= 1) {
    const j = Math.floor(Math.random() * (i + 1));
    [rows[i], rows[j]] = [rows[j], rows[i]];
  }
}

const initial = () => Array.from({ length: 6 }, (_, j) => (j < 5 ? 0.01 * normal() : 0));

// The error of the prediction x w + b.
const off = (v, row) => row.slice(0, 5).reduce((sum, x, j) => sum + x * v[j], v[5] - row[5]);

const loss = (v, rows) => rows.reduce((sum, row) => sum + off(v, row) ** 2 / 2, 0) / rows.length;

function gradient(v, rows) {
  const sum = new Array(6).fill(0);
  for (const row of rows) {
    const error = off(v, row) / rows.length;
    [...row.slice(0, 5), 1].forEach((x, j) => { sum[j] += error * x; });
  }
  return sum;
}

module.exports = { examples, gradient, initial, loss, shuffle };
