// What one step of DPO does to a pair, predicted and measured, on the demo's model. Run it: node examples/theory.mjs [REPORT_FOLDER]
import { fileURLToPath } from 'node:url';
import { loadModel, loadTokenizer } from 'keelgrad';
import { analyzeTheory, preparePreferenceData, theoryReport, writeReport } from 'keelgrad/analyze';

const demo = new URL('./assets/demo/', import.meta.resolve('keelgrad/package.json'));
const folder = fileURLToPath(new URL('model', demo));
const tokenizer = await loadTokenizer(folder);
const model = await loadModel(folder, { dtype: 'float64' });
const data = await preparePreferenceData(fileURLToPath(new URL('pairs_heldout.jsonl', demo)), {
  tokenizer: async () => tokenizer,
});

// One plain gradient step of size η on each pair alone; the model's weights stay as they are.
const options = { beta: 0.5, stepSizes: [1e-4, 1e-5] };
const results = await analyzeTheory(model, data.examples.slice(0, 2), options);
for (const { normChosen, normRejected, sequences } of results) {
  const [chosen] = sequences;
  const [predicted, measured] = [chosen.predictedPerStepSize * 1e-5, chosen.measured[1]];
  console.log(`‖g_w‖ ${normChosen.toFixed(1)}, ‖g_l‖ ${normRejected.toFixed(1)}: log π of chosen`);
  console.log(`  predicted ${predicted.toExponential(2)}, measured ${measured.toExponential(2)} nats`);
}

const [, , output] = process.argv;
if (output)
  await writeReport(output, theoryReport(results, options, { model: 'the demo’s model', dtype: model.dtype }));
model.dispose();
