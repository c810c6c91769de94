// Stable Preference Optimization of a model folder on preference pairs.
// Run it: node examples/spo.mjs MODEL_FOLDER PAIRS.jsonl OUTPUT_FOLDER
import { loadModel, loadTokenizer, saveAdapter, saveModel, spo } from 'keelgrad';

const [folder, pairs, output] = process.argv.slice(2);
const tokenizer = await loadTokenizer(folder);
const model = await loadModel(folder, { lora: { r: 16, alpha: 32 } });
const options = { tokenizer, maxSteps: 10, batchSize: 2, beta: 0.5, lambda: 1, lower: { steps: 1, lr: 2e-5 } };

for await (const { step, metrics } of spo(model, pairs, options)) {
  const [chosen, rejected] = [metrics['logps/chosen'], metrics['logps/rejected']];
  console.log(`step ${step}: chosen ${chosen.toFixed(2)}, rejected ${rejected.toFixed(2)}`);
}

await saveModel(model, `${output}/model`, { from: folder });
await saveAdapter(model, `${output}/adapter`, { baseModel: '../model' });
model.dispose();
