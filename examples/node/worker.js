// A worker that needs only gRPC and the .proto files: the book's linear regression, with Adadelta on the server.
//   node worker.js [HOST:PORT [FILE [MODEL]]]      FILE: airfoil_self_noise.dat; '' means made-up data of that form
const { setTimeout: sleep } = require('node:timers/promises');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');
const protobuf = require('protobufjs');
const airfoil = require('./airfoil');

const [target = 'localhost:50051', file, model = 'airfoil-node'] = process.argv.slice(2);
const [EPOCHS, BATCH] = [2, 10];
const definition = loader.loadSync(['deltaserve/v1/model_service.proto', 'deltaserve/v1/worker_service.proto'],
  { includeDirs: [`${__dirname}/../../proto`], keepCase: true, longs: Number, defaults: true });
const { ModelService, WorkerService } = grpc.loadPackageDefinition(definition).deltaserve.v1;
const [models, workers] = [ModelService, WorkerService].map((S) => new S(target, grpc.credentials.createInsecure()));
const { root } = protobuf.parse(`syntax = "proto3"; message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }`);

const deadline = () => ({ deadline: Date.now() + 60_000 });
const toBytes = (values) => Buffer.from(Float32Array.from(values).buffer); // little-endian on every platform of Node
const toFloats = (bytes) => new Float32Array(Uint8Array.from(bytes).buffer);
const promised = (start) => new Promise((resolve, reject) => start((e, value) => (e ? reject(e) : resolve(value))));

// Repeating a push after a lost answer is safe: the server recognises its sequence number and counts it once.
async function call(client, method, request, wait = 100) {
  try {
    return await promised((done) => client[method](request, deadline(), done));
  } catch (error) {
    if (error.code !== grpc.status.UNAVAILABLE || wait > 3000) throw error;
    return sleep(wait).then(() => call(client, method, request, 2 * wait));
  }
}

const createOrJoin = (config, weights) => promised((done) => {
  const stream = models.createModel(deadline(), done);
  stream.write({ config });
  stream.end({ weights: { offset: 0, data: toBytes(weights) } });
});

function why(error) {
  const [status] = error.metadata?.get('grpc-status-details-bin').map((b) => root.lookupType('Status').decode(b)) ?? [];
  const info = status?.details.find((any) => any.typeUrl.endsWith('google.rpc.ErrorInfo'));
  return (info ? `${root.lookupType('ErrorInfo').decode(info.value).reason}: ` : '') + (error.details ?? error.message);
}

async function pull(version) {
  const weights = new Float32Array(6);
  for await (const part of workers.pull({ model, wait_for_version: version }, deadline())) {
    if (part.header) version = part.header.position.version;
    else weights.set(toFloats(part.weights.data), part.weights.offset);
  }
  return [weights, version];
}

async function train(data, session, weights, version) {
  for (let n = 0, sequence = 1; n < EPOCHS * data.length; n += BATCH, sequence += 1) {
    if (n % data.length === 0) airfoil.shuffle(data);
    const gradient = airfoil.gradient(weights, data.slice(n % data.length, (n % data.length) + BATCH));
    const push = { header: { ...session, sequence, base_version: version }, gradient: toBytes(gradient) };
    const answer = await call(workers, 'step', push);
    [weights, version] = [toFloats(answer.weights), answer.position.version];
  }
  return weights;
}

async function main() {
  const data = airfoil.examples(file), tensors = [{ name: 'w', shape: [5, 1] }, { name: 'b', shape: [1] }];
  await createOrJoin({ name: model, tensors, groups: [{ adadelta: { rho: 0.9, eps: 1e-5 } }] }, airfoil.initial());
  const opened = await call(workers, 'openSession', { model, worker: `node-${process.pid}-${Date.now()}` });
  const session = { model, session_id: opened.session_id, epoch: opened.epoch };
  setInterval(() => call(workers, 'keepSession', session).catch(() => {}), opened.lease_seconds * 333).unref();
  const begin = Date.now();
  const weights = await train(data, session, ...await pull(opened.first_version));
  const epochSeconds = (Date.now() - begin) / 1000 / EPOCHS;
  await call(workers, 'closeSession', session);
  console.log(`loss: ${airfoil.loss(weights, data).toFixed(3)}, ${epochSeconds.toFixed(3)} sec/epoch`);
}
main().catch((error) => { console.error(`worker: ${why(error)}`); process.exitCode = 1; })
  .finally(() => [models, workers].forEach((client) => client.close()));
